"""The jinja environment of chat templates, the same as transformers' own.

Imported only where a template is rendered: jinja2 costs start-up time. The settings follow
transformers/utils/chat_template_utils.py of transformers 5.23, and a test compares the results.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mst.data.limits import (
    MADE,
    OPERATORS,
    TICK,
    Watch,
    limited,
    listed,
    made,
    measured_filter,
    spend,
    spend_call,
    spend_operator,
    tick,
)


class TemplateRefusedError(TemplateError):
    """The template itself called `raise_exception`."""


class GenerationBlocks(Extension):
    """Renders what is in `{% generation %}` blocks, and notes where it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn a block into a call of itself, which gives it a scope as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        text = caller()
        if _output.written is not None:
            _output.blocks.append((_output.written, text))
        return text


class _Output(threading.local):
    """How much this thread's template has written, and the generation blocks in it."""

    def __init__(self) -> None:
        self.written: int | None = None
        self.blocks: list[tuple[int, str]] = []


_output = _Output()


_OF_DICTIONARIES = frozenset(dir(dict))


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox, with limits of time and size.

    It remembers which attributes it allowed, since a template asks for the same in every row.
    """

    intercepted_binops = OPERATORS

    def __init__(self, **options: Any) -> None:
        """Take the options of `jinja2.Environment`."""
        super().__init__(**options)
        self._verdicts: dict[tuple[type, str], bool] = {}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute or an item, as jinja2 does."""
        # Messages are dictionaries, and most names are no attribute of theirs: jinja2 finds that
        # out by an exception each time.
        if type(obj) is dict and attribute not in _OF_DICTIONARIES:
            if attribute in obj:
                return obj[attribute]
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return jinja2's verdict."""
        if type(obj) not in (dict, list, str, GuardedNamespace, LoopContext):
            return super().is_safe_attribute(obj, attr, value)
        # Of an instance of these, jinja2 looks at the type and the name alone.
        key = type(obj), attr
        if key not in self._verdicts:
            if len(self._verdicts) >= 1000:  # names that the template makes up
                self._verdicts.clear()
            self._verdicts[key] = super().is_safe_attribute(obj, attr, value)
        return self._verdicts[key]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Count what an operator makes, and let it."""
        if operator == "+" and type(left) is type(right) is str:  # most of what templates do
            spend(len(left) + len(right))
            return left + right
        spend_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Count what a call makes, and let it."""
        # jinja wraps `str.format` to keep it from attributes.
        method = getattr(function, "__wrapped__", function)
        receiver = getattr(method, "__self__", None)
        if isinstance(receiver, str):
            args = tuple(map(listed, args)) if method.__name__ == "join" else args
            spend_call(method.__name__, receiver, args, kwargs)
        return made(super().call(context, function, *args, **kwargs))


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
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    for name, function in list(environment.filters.items()):
        environment.filters[name] = measured_filter(name, function)
    environment.filters |= {TICK: tick, MADE: made}
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = PlainDict()
    environment.globals["namespace"] = GuardedNamespace
    del environment.globals["lipsum"]
    tree = Watch().visit(environment.parse(source))
    code = environment.compile(tree)
    return Template.from_code(environment, code, environment.make_globals(None))


def rendered(source: str, values: Mapping[str, Any]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return what a template writes, and where its `{% generation %}` blocks stand in it.

    Raises:
        TemplateLimitError: it ran too long, or made too much.
        TemplateRefusedError: it called `raise_exception`.
        Exception: whatever else it does wrong.
    """
    pieces: list[str] = []
    _output.written, _output.blocks = 0, []
    try:
        with limited():
            for piece in compiled(source).generate(**values):
                pieces.append(piece)
                _output.written += len(piece)
                spend(len(piece))
    finally:
        _output.written = None
    text = "".join(pieces)
    # A block in a macro is rendered before what stands in front of it, so its place isn't known.
    blocks = _output.blocks if all(text.startswith(b, at) for at, b in _output.blocks) else []
    return text, tuple((start, start + len(block)) for start, block in blocks if block)
