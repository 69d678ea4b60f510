"""A row of a data set, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Message:
    """One turn. `loss` overrides whether an assistant turn is trained on; None leaves it open.

    Its repr leaves the text out: a traceback must not show a row.
    """

    role: str
    content: str = field(repr=False)
    loss: bool | None = None


@dataclass(frozen=True)
class Row:
    """One conversation, and where it stood: `number` is its line (JSONL), record (CSV, header
    not counted) or element (JSON array), from 1."""

    messages: tuple[Message, ...]
    file: str
    number: int


@dataclass(frozen=True)
class FileFacts:
    """One data file that was read: how it was understood, and a hash that a resumed run checks.

    Attributes:
        path: as resolved on disk.
        sha256: of the bytes.
        kind: "jsonl", "json" or "csv".
        shape: "messages", "alpaca" or "prompt-response".
        columns: the columns that were used, as "role=column".
        rows: rows read.
    """

    path: str
    sha256: str
    kind: str
    shape: str
    columns: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class DataSet:
    """All rows, in file order, and the files they came from."""

    rows: tuple[Row, ...]
    files: tuple[FileFacts, ...]
