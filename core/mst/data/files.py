"""From a data file to numbered records, read once and hashed as read."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.errors import DataError

KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv"}
ACCEPTED_SUFFIXES = ", ".join(KINDS)


@dataclass(frozen=True)
class Record:
    """One object or CSV record; `number` counts as in `mst.data.rows.Row`."""

    number: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class RecordFile:
    """The records of one file, in file order, and the hash of the bytes they came from."""

    path: str
    sha256: str
    kind: str
    records: tuple[Record, ...]


def read_records(spec: str) -> RecordFile:
    """Read one .jsonl, .json or .csv file.

    Args:
        spec: its path.

    Raises:
        DataError: when it cannot be read or parsed, or holds no rows. The message names the place
            and never quotes the file.
    """
    path = Path(spec).expanduser()
    kind = KINDS.get(path.suffix.lower())
    data = _read_bytes(path, kind)
    assert kind is not None
    file = str(path.resolve())
    text = _decode(file, data)
    records = tuple(_PARSERS[kind](file, text))
    if not records:
        raise DataError(
            f"{file} was given as a data set, but it holds no rows. Add at least one row, "
            "or pass another --dataset."
        )
    return RecordFile(file, hashlib.sha256(data).hexdigest(), kind, records)


def shown_names(names: Iterable[str]) -> str:
    """Return column names for an error message, at most twelve of them.

    A CSV file without a header line has a row's text where names should be, so only what looks
    like a name is shown; the rest is given by its length.
    """
    shown = []
    for name in names:
        plain = re.fullmatch(r"[A-Za-z_][\w.-]{0,31}", name, re.ASCII) or re.fullmatch(
            r"\w{1,8}", name
        )
        shown.append(f"'{name}'" if plain else f"(a name of {len(name)} characters)")
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return ", ".join(shown[:12]) + more if shown else "none"


def _read_bytes(path: Path, kind: str | None) -> bytes:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in KINDS)[:5]
        found = f"it holds {', '.join(inside)}" if inside else f"no {ACCEPTED_SUFFIXES} file in it"
        raise DataError(
            f"A data file was asked for, but {path} is a directory ({found}). Pass the file itself."
        )
    if not path.exists():
        raise DataError(f"No data file at {path}{_neighbours(path)}. Check the path.")
    if kind is None:
        raise DataError(
            f"{path} was given as a data set, but its suffix '{path.suffix}' is not one of "
            f"{ACCEPTED_SUFFIXES}. Convert it, or rename it to the suffix of what it holds."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} could not be read: {error.strerror}. Check its permissions."
        ) from None
    if not data.strip():
        raise DataError(f"{path} was given as a data set, but it is empty. Pass another file.")
    return data


def _neighbours(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (there is no directory {parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3)
    return f" (nearest there: {', '.join(near)})" if near else ""


def _decode(file: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start
    # Raised here and not in the handler: the handler's exception holds the whole file and would
    # stay reachable as __context__, even after `from None`.
    line = data.count(b"\n", 0, start) + 1
    raise DataError(
        f"{file} must be UTF-8, but byte {start + 1} (line {line}) is not. Convert it, for example "
        "with `iconv -f GB18030 -t UTF-8`, or save it as UTF-8 where it was made."
    )


def _parse_json(file: str, text: str, first_line: int, hint: str) -> Any:
    """Parse JSON that starts on `first_line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at")
        problem = f"line {first_line + error.lineno - 1}, column {error.colno}: {message}"
    except RecursionError:
        problem = f"line {first_line}: nested too deeply"
    except ValueError:
        problem = f"line {first_line}: a number with too many digits"
    # Outside the handler because JSONDecodeError.doc holds the text.
    raise DataError(f"{file} is not valid JSON at {problem}. {hint}")


def _jsonl(file: str, text: str) -> Iterable[Record]:
    # Not str.splitlines(): JSON strings may hold U+2028, at which that would split.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _parse_json(file, line, number, "Each line must be one whole JSON object.")
        yield Record(number, _object(file, number, value))


def _json(file: str, text: str) -> Iterable[Record]:
    hint = "One object a line? Then name the file .jsonl."
    value = _parse_json(file, text, 1, hint)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(
            f"{file} must hold an array of objects, or an object with that array under 'data'; "
            f"its top level is {json_type(value)}. Wrap the rows in [ ]."
        )
    for number, element in enumerate(value, start=1):
        yield Record(number, _object(file, number, element))


def _object(file: str, number: int, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{file}, row {number}: an object with named fields is expected, found "
            f"{json_type(value)}. In .jsonl each line is one object; a file that is one array "
            "is named .json."
        )
    return value


def json_type(value: object) -> str:
    """Return what JSON calls the type of a parsed value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {str: "text", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


def _csv(file: str, text: str) -> Iterable[Record]:
    # strict: a quote that is not closed is an error instead of one huge cell.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{file}, row {number + 1} (near line {reader.line_num}) is not valid CSV: "
                f"{error}. Quote cells that hold commas, quotes or line breaks, or use .jsonl."
            ) from None
        if not cells:
            continue
        if not header:
            header = _header(file, cells)
            continue
        number += 1
        if len(cells) != len(header):
            raise DataError(
                f"{file}, row {number} (ends on line {reader.line_num}): {len(header)} cells are "
                f"expected as in the header, found {len(cells)}. Quote cells that hold commas."
            )
        yield Record(number, dict(zip(header, cells, strict=True)))


def _header(file: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(
            f"{file} must have a header line with different column names, found "
            f"{shown_names(sorted(twice))} more than once. Rename or remove one of them."
        )
    return names


_PARSERS = {"jsonl": _jsonl, "json": _json, "csv": _csv}
