"""Which columns of a file play which role, told by their names and the first row."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mst.data.refusals import shown_names
from mst.errors import DataError, UsageError

# As ms-swift's automatic mapping has them, plus what public question sets use.
PROMPT_COLUMNS = ("query", "prompt", "question", "problem", "instruction")
RESPONSE_COLUMNS = ("response", "answer", "completion", "output", "target", "targets", "solution")
SYSTEM_COLUMNS = ("system", "system_prompt")
# Beside `text` they may be the answers to it, as in public classification sets.
CLASS_COLUMNS = ("label", "labels", "category", "class", "intent", "sentiment")
REASONING_COLUMNS = ("reasoning_content", "thinking")
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": PROMPT_COLUMNS,
    "response": RESPONSE_COLUMNS,
    "input": ("input",),
    "system": SYSTEM_COLUMNS,
    "history": ("history",),
    "tools": ("tools",),
    "reasoning": REASONING_COLUMNS,
    "text": ("text",),
    "chosen": ("chosen", "chosen_messages"),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
    "label": ("kto_tag", "label"),
    "images": ("images", "image"),
}
ROLES = tuple(_SYNONYMS)
# What the first line of a table may hold if it is a header; a row's cells are hardly any of these.
KNOWN_NAMES = frozenset(
    ("id", "idx", "index", "key", "name", "title", "context", "source", "date", "split", "url")
).union(ROLES, CLASS_COLUMNS, *_SYNONYMS.values())
_OPTIONAL = ("system", "history", "tools", "reasoning")
_LENIENT = (*_OPTIONAL, "input", "images")
# Shapes of one conversation, which images may stand in.
WITH_IMAGES = ("messages", "sharegpt", "alpaca", "prompt-response")
ACCEPTED_SHAPES = (
    "'messages' or 'conversations' (a list of turns); "
    "or 'instruction' and 'output' (optional: 'input', 'system', 'history'); "
    f"or one of {', '.join(PROMPT_COLUMNS)} and one of {', '.join(RESPONSE_COLUMNS)} "
    f"(optional: {', '.join(SYSTEM_COLUMNS)}, history); "
    "or 'chosen' and 'rejected'; or 'text'"
)


@dataclass(frozen=True)
class Columns:
    """How a file's rows are to be understood.

    Attributes:
        shape: "messages", "sharegpt", "alpaca", "prompt-response", "preference", "kto" or "text".
        needed: what a column is for, to its name; every row has it.
        optional: what a column may be for, to the names it may have; a row may lack it.
    """

    shape: str
    needed: Mapping[str, str]
    optional: Mapping[str, tuple[str, ...]]


def role_mapping(columns: Sequence[str]) -> dict[str, str]:
    """Return what `--columns question=prompt …` says, as role to column.

    Args:
        columns: COLUMN=ROLE each, or a JSON object of them as ms-swift takes it.

    Raises:
        UsageError: it has another form, an unknown role, or a role twice.
    """
    found: dict[str, str] = {}
    for column, role in _pairs(columns):
        canonical = _role_of(role)
        if canonical in found:
            raise UsageError(
                f"--columns gives two columns to '{canonical}'. Pass one COLUMN=ROLE for each role."
            )
        found[canonical] = column
    return found


def _pairs(columns: Sequence[str]) -> list[tuple[str, str]]:
    whole = ",".join(columns).strip()
    if whole.startswith("{"):
        try:
            mapping = json.loads(whole)
        except ValueError:
            mapping = None
        if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
            raise UsageError("--columns holds '{' but is no JSON object of texts. Mend it.")
        return list(mapping.items())
    pairs = []
    for each in columns:
        column, equals, role = each.rpartition("=")
        if not equals or not column.strip():
            raise UsageError(
                f"--columns takes COLUMN=ROLE, such as question=prompt; found {each!r}. Roles are "
                f"{', '.join(ROLES)}."
            )
        pairs.append((column.strip(), role.strip()))
    return pairs


def _role_of(name: str) -> str:
    if name in _SYNONYMS:
        return name
    for role, synonyms in _SYNONYMS.items():
        if name in synonyms:
            return role
    near = difflib.get_close_matches(name, ROLES, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"--columns: '{name}' is no role.{hint} Roles are {', '.join(ROLES)}.")


def find_columns(
    file: str, kind: str, first: Mapping[str, Any], mapping: Mapping[str, str]
) -> Columns:
    """Return how a file's rows are to be understood, by its first row.

    Args:
        file: for errors.
        kind: of the file.
        first: its first row.
        mapping: columns that the user gave to roles; those that the row lacks are passed over, for
            a data set may have files of several shapes. Names decide about the others.

    Raises:
        DataError: no known shape, or two columns for a role.
    """
    optional = {role: mapping[role] for role in _LENIENT if role in mapping}
    here = {role: column for role, column in mapping.items() if column in first} | optional
    absent = tuple(column for column in mapping.values() if column not in first)
    finder = _Finder(file, kind, first, here, absent)
    shape, needed = finder.shape()
    return Columns(shape, needed, finder.optional(shape, needed))


@dataclass(frozen=True)
class _Finder:
    """The first row, asked for shapes from the most telling to the least."""

    file: str
    kind: str
    first: Mapping[str, Any]
    mapping: Mapping[str, str]
    absent: tuple[str, ...]

    def names(self, role: str) -> tuple[str, ...]:
        """Return the names that a role's column may have."""
        given = set(self.mapping.values())
        if role in self.mapping:
            return (self.mapping[role],)
        return tuple(name for name in _SYNONYMS[role] if name not in given)

    def only(self, role: str) -> str | None:
        """Return the one column for a role; two would be a guess about what to learn."""
        found = [name for name in self.names(role) if name in self.first]
        if len(found) > 1:
            raise DataError(
                f"{self.file}: one column with the {role} is expected, found {shown_names(found)}. "
                f"Say which with --columns {found[0]}={role}, or remove all but one."
            )
        return found[0] if found else None

    def shape(self) -> tuple[str, dict[str, str]]:
        """Return the shape and its needed columns."""
        if self.only("rejected") is not None:
            found = self.preference()
            if found:
                return "preference", found
        shape, needed = self.plain()
        label = self.label(shape, needed)
        if label is not None:
            return "kto", {**needed, "label": label}
        return shape, needed

    def optional(self, shape: str, needed: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        """Return the names that columns which a row may lack can have."""
        roles: tuple[str, ...] = () if shape == "text" else _OPTIONAL
        if shape in WITH_IMAGES:
            roles = (*roles, "images")
        if "prompt" not in needed and shape != "preference":
            roles = tuple(role for role in roles if role != "history")
        if needed.get("prompt") == "instruction" or "input" in self.mapping:
            roles = (*roles, "input")
        if "chosen" in needed:
            # Where chosen and rejected are whole conversations, these are not needed.
            roles = (*roles, "prompt", "messages", "input")
        taken = set(needed.values())
        found = {
            role: tuple(name for name in self.names(role) if name not in taken) for role in roles
        }
        return {role: names for role, names in found.items() if names}

    def preference(self) -> dict[str, str] | None:
        """Return the columns of a better and a worse answer."""
        rejected, chosen = self.only("rejected"), self.only("chosen")
        assert rejected is not None
        if chosen is not None:
            return {"chosen": chosen, "rejected": rejected}
        messages = self.only("messages")
        if messages is not None:
            return {"messages": messages, "rejected": rejected}
        pair = self.pair()
        return {**pair, "rejected": rejected} if pair else None

    def plain(self) -> tuple[str, dict[str, str]]:
        """Return the shape of one conversation or text."""
        if not {"prompt", "response", "text"} & set(self.mapping):
            messages = self.only("messages")
            if messages is not None:
                return ("messages" if messages == "messages" else "sharegpt"), {
                    "messages": messages
                }
        if "text" not in self.mapping:
            pair = self.pair()
            if pair:
                return ("alpaca" if pair["prompt"] == "instruction" else "prompt-response"), pair
        text = self.only("text") or ("response" if self.lone_response() else None)
        if text is None:
            raise self.unknown()
        if text == "text" and "text" not in self.mapping:
            self.refuse_class_beside_text()
        return "text", {"text": text}

    def refuse_class_beside_text(self) -> None:
        """Raise DataError where `text` may be a question: to learn it as text would be a guess."""
        found = [name for name in CLASS_COLUMNS if name in self.first]
        if found:
            raise DataError(
                f"{self.file}: 'text' stands beside '{found[0]}', so it may be plain text or a "
                f"question. Say which with --columns text=text, or --columns text=prompt "
                f"{found[0]}=response."
            )

    def pair(self) -> dict[str, str] | None:
        """Return the columns of a prompt and its response."""
        first = self.first
        free = set(first) - set(self.mapping.values())
        if {"instruction", "output"} <= free and not {"prompt", "response"} & set(self.mapping):
            return {"prompt": "instruction", "response": "output"}
        prompt, response = self.only("prompt"), self.only("response")
        if prompt is None and "input" in first and "input" not in self.mapping.values():
            prompt = "input" if response is not None else None
        if prompt is None or response is None:
            return None
        return {"prompt": prompt, "response": response}

    def lone_response(self) -> bool:
        """Return whether the row is ms-swift's text for pre-training: a response to nothing."""
        return "response" in self.first and "prompt" not in self.mapping

    def label(self, shape: str, needed: Mapping[str, str]) -> str | None:
        """Return the column of KTO's label.

        `label` is a common name, so it counts only where its first value is true or false.
        """
        if shape == "text":
            return None
        if "label" in self.mapping:
            return self.mapping["label"]
        if "kto_tag" in self.first:
            return "kto_tag"
        value = self.first.get("label")
        text = isinstance(value, str) and value.strip().lower() in ("true", "false")
        told = isinstance(value, bool) or (self.kind in ("csv", "tsv") and text)
        return "label" if told and "label" not in needed.values() else None

    def unknown(self) -> DataError:
        """Return the error for columns that are none of ours."""
        hint = ""
        header = KNOWN_NAMES if self.kind in ("csv", "tsv") else None
        if header and not header & set(self.first):
            hint = " Is the header line missing? Then put one in front."
        if self.kind == "csv" and len(self.first) == 1:
            name = next(iter(self.first))
            if any(character in name for character in ";\t"):
                hint = " The header holds ';' or tabs: save the file with commas, or as .tsv."
        if self.absent:
            hint += f" --columns names {shown_names(self.absent)}, which it does not have."
        return DataError(
            f"{self.file}: no known set of columns in its first row; found "
            f"{shown_names(self.first, header)}, accepted {ACCEPTED_SHAPES}. Rename the columns, "
            f"or say what they are with --columns COLUMN=prompt COLUMN=response.{hint}"
        )


def optional_column(
    fields: Mapping[str, Any], names: Iterable[str]
) -> tuple[str | None, tuple[str, ...]]:
    """Return the one of `names` that a row fills, and all that it fills when there are several."""
    found = tuple(name for name in names if fields.get(name) not in (None, "", []))
    return (found[0] if len(found) == 1 else None), found if len(found) > 1 else ()
