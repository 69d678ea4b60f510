"""The jinja environment of chat templates, the same as transformers' own.

Imported only where a template is rendered: jinja2 costs start-up time. The settings follow
transformers/utils/chat_template_utils.py of transformers 5.23, and a test compares the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class TemplateRefusedError(TemplateError):
    """The template itself called `raise_exception`."""


class GenerationBlocks(Extension):
    """Accepts `{% generation %}` blocks, and renders what is in them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn a block into a call of itself, which gives it a scope as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainDict:
    """`dict(...)` for templates, without the type's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a new dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return `dict.fromkeys(...)`."""
        return dict.fromkeys(*args)


class GuardedNamespace(Namespace):
    """`namespace(...)` for templates, closed to names that lead into CPython."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        """Take the arguments of `dict`; `self` stays free as a name, as in jinja2."""
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute from `{% set ns.name = … %}`."""
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("chat templates cannot store underscore-prefixed attributes")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusedError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML characters and non-ASCII letters.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """Return a template ready to render; raises jinja2's TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = PlainDict()
    environment.globals["namespace"] = GuardedNamespace
    return environment.from_string(source)
