"""From records to conversations: which columns are meant, and what each row must have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mst.data.files import Record, RecordFile, json_type, read_records, shown_names
from mst.data.rows import DataSet, FileFacts, Message, Row
from mst.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# As ms-swift's automatic mapping has them, plus what public question sets use.
PROMPT_COLUMNS = ("query", "prompt", "question", "problem")
RESPONSE_COLUMNS = ("response", "answer", "completion", "output", "target")
SYSTEM_COLUMNS = ("system", "system_prompt")
ACCEPTED_SHAPES = (
    "'messages' (a list of {role, content}); "
    "or 'instruction' and 'output' (optional: 'input', 'system', 'history'); "
    f"or one of {', '.join(PROMPT_COLUMNS)} and one of {', '.join(RESPONSE_COLUMNS)} "
    f"(optional: {', '.join(SYSTEM_COLUMNS)}, history)"
)
# Other tools' names for a role, so that the error can say which one is meant.
_FOREIGN_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
# They change what is learned; dropping them would train on something else than the file says.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight", "tools")


def read(specs: Sequence[str]) -> DataSet:
    """Read data files into one data set, in the order given.

    Args:
        specs: paths of .jsonl, .json or .csv files.

    Raises:
        DataError: when a file or a row cannot be used; names file, row and field, and never
            quotes a row.
    """
    if not specs:
        raise DataError("A data set is needed, but none was given. Pass --dataset FILE.")
    rows: list[Row] = []
    files: list[FileFacts] = []
    for spec in specs:
        file = read_records(spec)
        columns = _columns(file)
        rows.extend(_row(file.path, columns, record) for record in file.records)
        files.append(
            FileFacts(
                path=file.path,
                sha256=file.sha256,
                kind=file.kind,
                shape=_shape(columns),
                columns=tuple(f"{role}={column}" for role, column in columns.items()),
                rows=len(file.records),
            )
        )
    return DataSet(tuple(rows), tuple(files))


def _shape(columns: Mapping[str, str]) -> str:
    if "messages" in columns:
        return "messages"
    return "alpaca" if "instruction" in columns else "prompt-response"


def _columns(file: RecordFile) -> dict[str, str]:
    """Map what a column is for to its name: required ones by the first row, others by any."""
    first = file.records[0].fields
    if "messages" in first:
        return {"messages": "messages"}
    names = set().union(*(record.fields for record in file.records))
    if "instruction" in first and "output" in first:
        columns = {"instruction": "instruction", "output": "output"}
        if "input" in names:
            columns["input"] = "input"
    else:
        prompt = _only(file.path, "prompt", PROMPT_COLUMNS, first)
        response = _only(file.path, "response", RESPONSE_COLUMNS, first)
        if prompt is None or response is None:
            raise _no_shape(file, first)
        columns = {"prompt": prompt, "response": response}
    system = _only(file.path, "system", SYSTEM_COLUMNS, names)
    if system is not None:
        columns["system"] = system
    if "history" in names:
        columns["history"] = "history"
    return columns


def _only(file: str, role: str, synonyms: Sequence[str], names: Iterable[str]) -> str | None:
    """Return the one synonym that is among `names`; two would be a guess about what to learn."""
    present = set(names)
    found = [name for name in synonyms if name in present]
    if len(found) > 1:
        raise DataError(
            f"{file}: one column with the {role} is expected, found {shown_names(found)}. "
            "Remove or rename all but one."
        )
    return found[0] if found else None


def _no_shape(file: RecordFile, first: Mapping[str, Any]) -> DataError:
    hint = ""
    if file.kind == "csv" and len(first) == 1 and any(c in next(iter(first)) for c in ";\t"):
        hint = " The header holds ';' or tabs: save the file with commas."
    return DataError(
        f"{file.path}: no known set of columns in its first row; found {shown_names(first)}, "
        f"accepted {ACCEPTED_SHAPES}. Rename the columns.{hint}"
    )


def _row(file: str, columns: Mapping[str, str], record: Record) -> Row:
    where = f"{file}, row {record.number}"
    _refuse_unsupported(where, record.fields)
    if "messages" in columns:
        messages = _messages(where, _field(where, record.fields, "messages", list))
    else:
        messages = _pair(where, columns, record.fields)
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise DataError(
            f"{where}: an assistant turn is needed to learn from, found none in 'messages'. "
            "Add the answer, or remove the row."
        )
    return Row(messages, file, record.number)


def _messages(where: str, items: Sequence[Any]) -> tuple[Message, ...]:
    messages = []
    for number, item in enumerate(items, start=1):
        place = f"{where}, message {number}"
        if not isinstance(item, dict):
            raise DataError(
                f"{place}: an object with 'role' and 'content' is expected, "
                f"found {json_type(item)}. Mend or remove the row."
            )
        _refuse_unsupported(place, item)
        role = _role(place, _field(place, item, "role", str))
        content = _text(place, "content", _field(place, item, "content", str), role)
        messages.append(Message(role, content, _loss(place, item.get("loss"), role)))
    return tuple(messages)


def _pair(where: str, columns: Mapping[str, str], fields: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the conversation of a row that has a prompt and a response in columns."""

    def optional(role: str) -> str:
        column = columns.get(role)
        if column is None or fields.get(column) is None:
            return ""
        return _text(where, column, _field(where, fields, column, str), role)

    if "instruction" in columns:
        question, answer = columns["instruction"], columns["output"]
    else:
        question, answer = columns["prompt"], columns["response"]
    asked = _text(where, question, _field(where, fields, question, str), "user")
    # instruction + "\n" + input, as ms-swift and LLaMA-Factory join them.
    prompt = "\n".join(part for part in (asked, optional("input")) if part)
    response = _text(where, answer, _field(where, fields, answer, str), "assistant")
    system = optional("system")
    start = [Message("system", system)] if system else []
    history = _history(where, fields.get("history"))
    return (*start, *history, Message("user", prompt), Message("assistant", response))


def _history(where: str, value: object) -> list[Message]:
    # CSV has no lists: an empty cell is no history.
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise DataError(
            f"{where}: field 'history' must be a list of [question, answer] pairs, "
            f"found {json_type(value)}. Use .jsonl for rows with a history."
        )
    messages = []
    for number, pair in enumerate(value, start=1):
        place = f"{where}, pair {number} of field 'history'"
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise DataError(f"{place}: two texts are expected, [question, answer]. Mend the row.")
        messages.append(Message("user", _text(place, "history", pair[0], "user")))
        messages.append(Message("assistant", _text(place, "history", pair[1], "assistant")))
    return messages


def _field(where: str, fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a required field of type `kind` (str or list)."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
        found = f"nearest there: {shown_names(near)}" if near else f"found {shown_names(fields)}"
        raise DataError(
            f"{where}: field '{name}' is needed as in the first row, but is not there ({found}). "
            "Add it, or remove the row."
        )
    value = fields[name]
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list"
        raise DataError(
            f"{where}: field '{name}' must be {expected}, found {json_type(value)}. Mend the row."
        )
    return value


def _text(where: str, name: str, value: str, role: str) -> str:
    if role == "assistant" and not value.strip():
        raise DataError(
            f"{where}: field '{name}' is the assistant's answer, but it is empty: there is nothing "
            "to learn. Fill it in, or remove the row."
        )
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        # JSON can escape half of a pair; no tokenizer takes it, and its error would quote the text.
        raise DataError(
            f"{where}: field '{name}' holds half of a surrogate pair (\\ud800 to \\udfff), which "
            "is not text. Remove it."
        )
    return value


def _role(where: str, role: str) -> str:
    if role not in ROLES:
        # The value is shown only when it is a known name: with swapped fields it is a row's text.
        meant = _FOREIGN_ROLES.get(role)
        hint = f"For '{role}' write '{meant}'." if meant else "Mend the row."
        raise DataError(f"{where}: field 'role' must be one of {', '.join(ROLES)}. {hint}")
    return role


def _loss(where: str, value: object, role: str) -> bool | None:
    if value is None or isinstance(value, bool):
        if value and role != "assistant":
            raise DataError(
                f"{where}: field 'loss' is true on a '{role}' turn, but only assistant turns are "
                "learned. Remove it, or pass --train-on all."
            )
        return value
    raise DataError(
        f"{where}: field 'loss' must be true, false or absent, found {json_type(value)}. Mend it."
    )


def _refuse_unsupported(where: str, fields: Mapping[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise DataError(
                f"{where}: field '{name}' changes what is learned, and mst cannot train on it. "
                "Write it into 'content', or remove it."
            )
