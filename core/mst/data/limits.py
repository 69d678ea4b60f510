"""Limits of time and size for chat templates, which come with models and are programs.

jinja's sandbox keeps a template from the machine, but lets it run for ever and fill the memory.
Here a clock is read in each turn of a loop and each call of a macro, and all values that a
template makes are counted: beforehand where a short expression can make a long one, else after.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateError
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

# A conversation of a million tokens is some 4 million characters, and renders in a second.
SECONDS = 10.0
# All values of one rendering together; each step of a template counts what it makes.
CHARACTERS = 256 * 2**20
# Widths, indents and exponents. Templates have indents of 4 and widths below 100.
LARGEST_NUMBER = 1_000

# Names of the filters that `Watch` puts into a template.
TICK, MADE = "mst_tick", "mst_made"
# Operators that make longer values; a sandbox hands them to `spend_operator`.
OPERATORS = frozenset({"+", "*", "**", "%"})
_WIDE_FORMAT = re.compile(r"[%{][^%{}]*\d{4,}")
_limits = threading.local()


class TemplateLimitError(TemplateError):
    """A template ran too long or made too much; the message says which, and quotes nothing."""


@contextmanager
def limited(seconds: float = SECONDS, characters: int = CHARACTERS) -> Iterator[None]:
    """Give what this thread renders meanwhile so many seconds and so many characters."""
    _limits.end, _limits.left = time.monotonic() + seconds, characters
    _limits.seconds, _limits.characters = seconds, characters
    try:
        yield
    finally:
        del _limits.end, _limits.left


def spend(characters: int) -> None:
    """Count characters that were made or will be; raises TemplateLimitError beyond the limit."""
    left = getattr(_limits, "left", None)
    if left is None:
        return  # jinja works constants out while it compiles; what is measured there was short
    if characters > left:
        raise TemplateLimitError(f"it makes more than {_limits.characters:,} characters")
    _limits.left = left - characters


@pass_context
def tick(context: Context, value: object) -> str:
    """Raise TemplateLimitError past the deadline.

    It is a filter, because those are called directly; and takes the context, so that jinja never
    works it out while it compiles.
    """
    if time.monotonic() > getattr(_limits, "end", float("inf")):
        raise TemplateLimitError(f"it ran for more than {_limits.seconds:g} seconds")
    return ""


def made(value: Any) -> Any:
    """Return a value as it is, and count it."""
    if isinstance(value, (str, list, tuple, dict)):
        spend(_size(value))
    return value


def spend_operator(operator: str, left: Any, right: Any) -> None:
    """Count what an operator of `OPERATORS` will make."""
    if operator == "+":
        if not isinstance(left, int):
            spend(_size(left) + _size(right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and not isinstance(value, (int, float)):
                spend(_size(value) * max(times, 0))
        _spend_bits(left, right, _bits(left) + _bits(right))
    elif operator == "**":
        _spend_bits(left, right, _bits(left) * abs(right) if isinstance(right, int) else 0)
    elif isinstance(left, str):
        spend(_format_size(left, right if isinstance(right, tuple) else (right,)))


def spend_call(name: str, receiver: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count what a method of text, or a filter, may make beyond what it is given.

    Args:
        name: of the method or filter; those that make nothing longer are let through.
        receiver: what it works on.
        args: its arguments; a generator in them must be a list already.
        kwargs: its arguments by name.
    """
    if name not in _GROWTH:
        return
    given = [*args, *kwargs.values()]
    numbers = [value for value in given if isinstance(value, int)]
    if any(abs(value) > LARGEST_NUMBER for value in numbers):
        raise TemplateLimitError(f"it asks '{name}' for more than {LARGEST_NUMBER:,}")
    spend(_GROWTH[name](receiver, given, max(map(abs, numbers), default=0)))


def measured_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a jinja filter whose result is counted before it is made, and after."""
    # jinja puts its context first where a filter asks for it; what it works on comes next.
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    def measured(*args: Any, **kwargs: Any) -> Any:
        if name == "join":
            args = (*args[:place], listed(args[place]), *args[place + 1 :])
        spend_call(name, args[place], args[place + 1 :], kwargs)
        return made(function(*args, **kwargs))

    if place:
        measured.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return measured


def listed(value: Any) -> Any:
    """Return a generator's items as a list, so that they can be counted and used once more."""
    return value if isinstance(value, (str, list, tuple, dict)) else list(value)


class Watch(NodeTransformer):
    """Puts a look at the clock into each loop and macro, and counts values as they are made.

    Counted are lists, dictionaries, what is joined by `~`, and what a `{% set %}` block keeps.
    """

    def _clocked(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        look = nodes.Filter(nodes.Const(None), TICK, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(look))
        return node

    visit_For = visit_Macro = visit_CallBlock = _clocked

    def _counted(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return nodes.Filter(node, MADE, [], [], None, None)

    visit_Concat = visit_List = visit_Tuple = visit_Dict = _counted

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        """Count what the block keeps, after its own filter."""
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, MADE, [], [], None, None)
        return node


def _size(value: Any) -> int:
    """Return the characters of a value and of all that it holds, at least 1 for each item."""
    if isinstance(value, str):
        return len(value)
    total, waiting = 0, [value]
    budget = getattr(_limits, "left", CHARACTERS)
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item) + 1
        elif isinstance(item, (list, tuple)):
            total += 1 + len(item)
            waiting.extend(item)
        elif isinstance(item, dict):
            total += 1 + 2 * len(item)
            waiting.extend((*item.keys(), *item.values()))
        else:
            total += 1
        # Lists that hold each other twice grow without bound; items cost more than characters.
        if total > budget:
            spend(total)
    return total


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _spend_bits(left: Any, right: Any, bits: int) -> None:
    # The time of a product grows with the square of its length.
    if isinstance(left, int) and isinstance(right, int) and bits > 64 * LARGEST_NUMBER:
        raise TemplateLimitError(f"it counts with a number of {bits:,} bits")


def _format_size(pattern: Any, values: tuple[Any, ...]) -> int:
    if not isinstance(pattern, str):
        return 0
    wide = any(isinstance(value, int) and abs(value) > LARGEST_NUMBER for value in values)
    if _WIDE_FORMAT.search(pattern) or ("*" in pattern and wide):
        raise TemplateLimitError(f"it asks 'format' for more than {LARGEST_NUMBER:,}")
    fields = pattern.count("%") + pattern.count("{")
    return len(pattern) + fields * (LARGEST_NUMBER + max(map(_size, values), default=0))


def _padded(receiver: Any, given: list[Any], number: int) -> int:
    # Each line, each tab or each item may be given so many characters.
    items = receiver.count("\n") + receiver.count("\t") + 1 if isinstance(receiver, str) else 1
    texts = max((len(value) for value in given if isinstance(value, str)), default=0)
    return _size(receiver) + items * (number + texts)


def _replaced(receiver: Any, given: list[Any], number: int) -> int:
    texts = [value if isinstance(value, str) else str(value) for value in given[:2]]
    if not isinstance(receiver, str) or len(texts) < 2:
        return 0
    return len(receiver) + receiver.count(texts[0]) * len(texts[1])


def _joined(receiver: Any, given: list[Any], number: int) -> int:
    # As a method the separator is what it works on, as a filter its argument.
    separator, parts = (receiver, given[:1]) if isinstance(receiver, str) else ("", [receiver])
    items = parts[0] if parts and isinstance(parts[0], (list, tuple, dict)) else ()
    between = max(_size(separator), max(map(_size, given), default=0) if not separator else 0)
    return _size(items) + len(items) * between


def _translated(receiver: Any, given: list[Any], number: int) -> int:
    return (_size(receiver) + 1) * max(1, _size(given[0]) if given else 1)


_GROWTH: dict[str, Callable[[Any, list[Any], int], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "indent"), _padded),
    **dict.fromkeys(("batch", "slice"), _padded),
    "wordwrap": lambda receiver, given, number: (_size(receiver) + 1) * 2 * (1 + _texts(given)),
    "tojson": lambda receiver, given, number: _size(receiver) * (1 + number),
    "replace": _replaced,
    "join": _joined,
    "translate": _translated,
    "format": lambda receiver, given, number: _format_size(receiver, tuple(given)),
    "format_map": lambda receiver, given, number: _format_size(receiver, tuple(given)),
}


def _texts(given: list[Any]) -> int:
    return sum(len(value) for value in given if isinstance(value, str))
