"""Data files that are text: lines and cells, checked for what is no text."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from mst.data.columns import KNOWN_NAMES
from mst.data.refusals import Place, RowError, json_type, refuse, shown_names
from mst.errors import DataError

# Longer than any conversation (16 M tokens), and short enough to hold.
MAX_LINE_BYTES = 64 << 20
_DISCARD_BYTES = 1 << 20
# UTF-32's little-endian mark begins with UTF-16's, so it stands first.
_FOREIGN_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "a zip archive",
          b"PAR1": "parquet", b"ARROW1": "arrow"}  # fmt: skip
Fields = Mapping[str, Any]
Parsed = Iterator[tuple[int, Fields] | RowError]


def lines(
    file: str, stream: BinaryIO, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | RowError]]:
    """Yield each line with its number, its end included; no BOM, no more than `max_bytes`.

    Raises:
        DataError: when the file is UTF-16 or no text.
    """
    number = 0
    while True:
        # Only b"\n" ends a line: JSON strings may hold U+2028 and the like.
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        number += 1
        if number == 1:
            check_start(file, line)
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > max_bytes:
            while not line.endswith(b"\n") and line:
                line = stream.readline(_DISCARD_BYTES)
            yield number, too_long(file, number, max_bytes)
        else:
            yield number, line


def check_start(file: str, start: bytes) -> None:
    """Raise DataError when a file's first bytes say that it is no UTF-8 text."""
    for mark, encoding in _FOREIGN_MARKS.items():
        if start.startswith(mark):
            raise DataError(
                f"{file} must be UTF-8, but it is {encoding}, as its byte order mark says. Convert "
                f"it with `iconv -f {encoding} -t UTF-8`, or save it as UTF-8 where it was made."
            )
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(
                f"{file} is named as text, but it is {name}. Give it that suffix, or unpack it."
            )


def too_long(file: str, number: int, max_bytes: int) -> RowError:
    """Return the refusal of a line that is too long."""
    return RowError(
        Place(file, number),
        f"a line may have {max_bytes >> 20} MiB, and this one is longer",
        "Split it; a file that is one JSON array is named .json.",
    )


def decoded(place: Place, line: bytes) -> str:
    """Return a line as text.

    Raises:
        RowError: when it is not UTF-8, or holds NUL.
    """
    if b"\0" in line:
        refuse(
            place,
            "it holds NUL bytes, so it is damaged, or UTF-16",
            "Remove them, or convert the file with `iconv -f UTF-16LE -t UTF-8`.",
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start
    # Raised here and not in the handler: the handler's exception holds the line and would stay
    # reachable as __context__, even after `from None`.
    raise RowError(
        place,
        "it must be UTF-8, but is not",
        "Convert the file, for example with `iconv -f GB18030 -t UTF-8`, or save it as UTF-8 where "
        "it was made.",
        f"line {place.row}, byte {start + 1} of it",
    )


def json_line(file: str, number: int, line: bytes) -> Fields:
    """Return the object on one line of a JSONL file.

    Raises:
        RowError: when it is none.
    """
    place = Place(file, number)
    text = decoded(place, line).rstrip("\r\n")
    value, problem, where = _parsed(text, number)
    if problem:
        refuse(
            place,
            f"it is not valid JSON: {problem}",
            "Each line must be one whole JSON object.",
            where,
        )
    return _object(place, value)


def _parsed(text: str, first_line: int) -> tuple[Any, str, str]:
    """Parse JSON that starts on `first_line`; return it, or what is wrong and where."""
    try:
        return json.loads(text), "", ""
    except json.JSONDecodeError as error:
        # Returned and not raised because JSONDecodeError.doc holds the text.
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        return None, error.msg.removesuffix(" at"), place
    except RecursionError:
        return None, "nested too deeply", f"line {first_line}"
    except ValueError:
        return None, "a number with too many digits", f"line {first_line}"


def _object(place: Place, value: object) -> Fields:
    if not isinstance(value, dict):
        refuse(
            place,
            f"an object with named fields is expected, found {json_type(value)}",
            "In .jsonl each line is one object; a file that is one array is named .json.",
        )
    return value


def _jsonl(file: str, stream: BinaryIO) -> Parsed:
    for number, line in lines(file, stream):
        if isinstance(line, RowError):
            yield line
        elif line.strip():
            try:
                yield number, json_line(file, number, line)
            except RowError as error:
                yield error


def _json(file: str, stream: BinaryIO) -> Parsed:
    data = stream.read()
    check_start(file, data[:8])
    text = _whole_text(file, data.removeprefix(codecs.BOM_UTF8))
    del data
    if not text.strip():
        return
    value, problem, where = _parsed(text, 1)
    del text
    if problem:
        raise DataError(
            f"{file} is not valid JSON at {where}: {problem}. One object a line? Then name the "
            "file .jsonl."
        )
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(
            f"{file} must hold an array of objects, or an object with that array under 'data'; "
            f"its top level is {json_type(value)}. Wrap the rows in [ ]."
        )
    for number, element in enumerate(value, start=1):
        try:
            yield number, _object(Place(file, number), element)
        except RowError as error:
            yield error


def _whole_text(file: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start
    line = data.count(b"\n", 0, start) + 1
    raise DataError(
        f"{file} must be UTF-8, but byte {start + 1} (line {line}) is not. Convert it, for example "
        "with `iconv -f GB18030 -t UTF-8`, or save it as UTF-8 where it was made."
    )


def _txt(file: str, stream: BinaryIO) -> Parsed:
    for number, line in lines(file, stream):
        if isinstance(line, RowError):
            yield line
            continue
        try:
            text = decoded(Place(file, number), line).rstrip("\r\n")
        except RowError as error:
            yield error
            continue
        if text.strip():
            yield number, {"text": text}


class _TextLines:
    """A file's lines as text, for a reader whose records may go over several of them.

    Attributes:
        bad: why the last record holds a line that is no text; the reader takes it, and resets it.
    """

    def __init__(self, file: str, stream: BinaryIO) -> None:
        self.bad: RowError | None = None
        self._file = file
        self._texts = self._split(stream)

    def __iter__(self) -> Iterator[str]:
        return self._texts

    def _split(self, stream: BinaryIO) -> Iterator[str]:
        for number, line in lines(self._file, stream):
            text = self._text(number, line)
            if "\r" in text[:-2]:
                # Files of old Macs end their lines with it alone.
                yield from re.split(r"(?<=\r)(?!\n)", text)
            else:
                yield text

    def _text(self, number: int, line: bytes | RowError) -> str:
        try:
            if isinstance(line, RowError):
                raise line
            return decoded(Place(self._file, number), line)
        except RowError as error:
            self.bad = error
        # Its quotes and delimiters still count, or the records after it would be misread.
        return (
            ""
            if isinstance(line, RowError)
            else line.replace(b"\0", b"").decode("utf-8", "replace")
        )


def _delimited(delimiter: str) -> Callable[[str, BinaryIO], Parsed]:
    def parse(file: str, stream: BinaryIO) -> Parsed:
        texts = _TextLines(file, stream)
        # strict: a quote that is not closed is an error instead of one huge cell.
        reader = csv.reader(texts, delimiter=delimiter, strict=True)
        header: list[str] = []
        number = 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _malformed(file, number + 1, reader.line_num, error) from None
            bad, texts.bad = texts.bad, None
            if not cells and bad is None:
                continue
            if not header:
                if bad is not None:
                    raise bad
                header = _header(file, cells)
                continue
            number += 1
            if bad is not None:
                yield RowError(Place(file, number), bad.reason, bad.fix, bad.found)
            elif len(cells) == len(header):
                yield number, dict(zip(header, cells, strict=True))
            else:
                yield _wrong_width(Place(file, number), len(header), len(cells), reader.line_num)

    return parse


def _malformed(file: str, number: int, line: int, error: csv.Error) -> DataError:
    return DataError(
        f"{file}, row {number} (near line {line}) is not valid CSV: {error}. Quote cells that hold "
        "delimiters, quotes or line breaks, or use .jsonl."
    )


def _wrong_width(place: Place, expected: int, found: int, line: int) -> RowError:
    return RowError(
        place,
        f"{expected} cells are expected as in the header, found {found}",
        "Quote cells that hold the delimiter.",
        f"ends on line {line}",
    )


def _header(file: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(
            f"{file} must have a header line with different column names, found "
            f"{shown_names(sorted(twice), KNOWN_NAMES)} more than once. Rename or remove one of "
            "them."
        )
    return names


PARSERS: Mapping[str, Callable[[str, BinaryIO], Parsed]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "txt": _txt,
}
