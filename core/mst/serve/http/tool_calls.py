"""Calls of tools in what a model writes: Hermes' and Qwen's tags, or plain JSON."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.serve.http.texts import CALL_BEGIN, Held

if TYPE_CHECKING:
    from mst.serve.http.shapes import Tool

# As the templates of Hermes 2 Pro, Qwen 2.5 and 3 and MiniMind ask of the model.
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_FENCED = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)


@dataclass(frozen=True)
class FoundCall:
    """A call that a model has written.

    Attributes:
        id: made up here, for the result to name.
        name: of the tool.
        arguments: JSON text of an object.
    """

    id: str
    name: str
    arguments: str = field(repr=False)


def calls_in(text: str, names: Collection[str]) -> tuple[str, tuple[FoundCall, ...]]:
    """Return the text without its calls, and the calls.

    What looks like a call, but is no JSON or names no tool of the request, stays text.

    Args:
        text: all that the model wrote.
        names: of the tools that there are.
    """
    tagged = _TAGGED.findall(text)
    if tagged:
        found = [_call(_json(each), names) for each in tagged]
        if all(found):
            return _TAGGED.sub("", text).strip(), tuple(each for each in found if each)
        return text, ()
    fenced = _FENCED.match(text.strip())
    value = _json(fenced[1] if fenced else text.strip())
    listed = value if isinstance(value, list) else [value]
    calls = [_call(each, names) for each in listed]
    if calls and all(calls):
        return "", tuple(each for each in calls if each)
    return text, ()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, names: Collection[str]) -> FoundCall | None:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    # Llama 3.1 writes "parameters".
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return FoundCall(f"call_{secrets.token_hex(12)}", name, text)


class Watch:
    """Text of a stream up to where a call may begin; from there on it is kept for the end."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._held = Held((CALL_BEGIN,))
        self._kept: list[str] = []
        self._keeps = False
        self._begun = False

    def push(self, text: str) -> str:
        """Return what is no part of a call for certain."""
        if self._keeps:
            self._kept.append(text)
            return ""
        if not self._begun and text.strip():
            self._begun = True
            # An answer that is JSON, fenced or not, may be a call as a whole.
            if text.lstrip()[0] in "{[`":
                self._keeps = True
                self._kept.append(text)
                return ""
        shown = self._held.push(text)
        if self._held.found is not None:
            self._keeps = True
            self._kept.append(CALL_BEGIN + self._held.rest())
        return shown

    def end(self, names: Collection[str]) -> tuple[str, tuple[FoundCall, ...]]:
        """Return what is left to show, and the calls."""
        if not self._keeps:
            return self._held.rest(), ()
        return calls_in("".join(self._kept), names)


def schema_of(tools: Sequence[Tool], only: str | None = None) -> Mapping[str, Any]:
    """Return the JSON schema of a call, for an answer that has to be one.

    Args:
        tools: of the request.
        only: the one that has to be called; None for any.
    """
    schemas: list[Mapping[str, Any]] = [
        {
            "type": "object",
            "properties": {
                "name": {"const": each.function.name},
                "arguments": each.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for each in tools
        if only in (None, each.function.name)
    ]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
