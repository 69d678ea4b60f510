"""A row of a data set, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mst.data.images import Image


@dataclass(frozen=True)
class Message:
    """One turn. Its repr leaves the text out: a traceback must not show a row.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: its text, "" for a turn that only calls tools, or shows images.
        loss: overrides whether an assistant turn is trained on; None leaves it open.
        weight: factor of the loss of this turn's tokens; None is 1.
        reasoning: what an assistant turn thought before its answer (`reasoning_content`).
        tool_calls: calls that an assistant turn makes, as OpenAI's API writes them:
            {"type": "function", "function": {"name": …, "arguments": {…}}}.
        tool_call_id: which call a tool turn answers.
        name: of the tool or speaker, where the row gives it.
        parts: its text and images in their order, where it has images; `content` is the text of
            them.
    """

    role: str
    content: str = field(repr=False)
    loss: bool | None = None
    weight: float | None = None
    reasoning: str | None = field(default=None, repr=False)
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    tool_call_id: str | None = field(default=None, repr=False)
    name: str | None = field(default=None, repr=False)
    parts: tuple[str | Image, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Row:
    """One thing to learn from, and where it stood.

    Attributes:
        messages: the conversation; of a preference the better one, whole. Empty for plain text.
        file: it came from.
        number: its line (JSONL, text), record (CSV and TSV, header not counted), element (JSON
            array) or row (parquet, arrow), from 1.
        tools: JSON schemas of the tools that the conversation may call.
        rejected: of a preference, the worse conversation, whole; it begins with the same turns.
        desirable: KTO's label of the last answer; None where there is none.
        text: plain text, learnt as it is.
        unit: to whom it belongs, as `--dp-unit` has it; None where that is not asked for.
    """

    messages: tuple[Message, ...]
    file: str
    number: int
    tools: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None
    text: str | None = field(default=None, repr=False)
    unit: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class FileFacts:
    """One data file that was read: how it was understood, and a hash that a resumed run checks.

    Attributes:
        path: as resolved on disk.
        sha256: of the bytes.
        kind: "jsonl", "json", "csv", "tsv", "txt", "parquet" or "arrow".
        shape: as `mst.data.columns.Columns` has it.
        columns: the columns that were used, as "role=column".
        rows: rows taken.
        selection: which of the rows that could be taken, in words; "" for all.
        skipped: rows left out because they are bad: a line for each reason, with their number.
        images: how many the rows name.
        images_sha256: of all of them; "" for none.
        key: name of the key that opened it, which is no secret; "" where it is not encrypted.
    """

    path: str
    sha256: str
    kind: str
    shape: str
    columns: tuple[str, ...]
    rows: int
    selection: str = ""
    skipped: tuple[str, ...] = ()
    images: int = 0
    images_sha256: str = ""
    key: str = ""


def fingerprint(facts: FileFacts) -> tuple[str, str]:
    """Return what tells a file and its images from others: their hashes."""
    return facts.sha256, facts.images_sha256


def changed_files(before: Iterable[FileFacts], after: Iterable[FileFacts]) -> list[str]:
    """Return the paths of files that differ, with an image of theirs or without, or are not there.

    Args:
        before: as they were recorded.
        after: as they were read again; in any order.
    """
    recorded = {each.path: fingerprint(each) for each in before}
    found = {each.path: fingerprint(each) for each in after}
    return sorted(path for path in recorded | found if recorded.get(path) != found.get(path))


@dataclass(frozen=True)
class DataSet:
    """All rows, in file order, and the files they came from."""

    rows: tuple[Row, ...]
    files: tuple[FileFacts, ...]
