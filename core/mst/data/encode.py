"""From conversations to token ids with labels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from mst.data.rows import Row
from mst.data.spans import Span, assistant_spans
from mst.data.template import ChatTemplate
from mst.data.tokens import EncodedText, TextTokenizer
from mst.errors import DataError

# torch's cross entropy leaves this label out.
IGNORE = -100
TRUNCATION_STRATEGIES = ("delete", "right")
# Rows tokenized at once: enough to keep all cores busy, few enough that the Rust objects, which
# are ten times as large as the ids, do not pile up.
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Example:
    """One row for the model. Its repr is empty: ids are text to whoever has the tokenizer.

    Attributes:
        input_ids: 32-bit token ids.
        labels: of the same length and not shifted: the id itself where it carries loss, else
            `IGNORE`.
        row: the row it came from.
        weights: factor of each token's loss, of the same length; None where all are 1.
        rejected: of a preference, the worse conversation; this one is the better.
    """

    input_ids: array[int] = field(repr=False)
    labels: array[int] = field(repr=False)
    row: Row = field(repr=False)
    weights: array[float] | None = field(default=None, repr=False)
    rejected: Example | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EncodeStats:
    """What became of the rows.

    Attributes:
        rows: examples that are left.
        tokens: their tokens.
        label_tokens: those of them that carry loss.
        longest: tokens of the longest row, before any was cut or left out.
        too_long: rows longer than `max_length`.
        deleted: rows left out, because too long or because cutting left nothing to learn.
        truncated: rows that were cut and kept.
    """

    rows: int
    tokens: int
    label_tokens: int
    longest: int
    too_long: int
    deleted: int
    truncated: int


@dataclass(frozen=True)
class Encoded:
    """Examples in the order of their rows."""

    examples: tuple[Example, ...]
    stats: EncodeStats


def encode(
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    max_length: int | None,
    train_on: str = "assistant",
    truncation_strategy: str = "delete",
) -> Encoded:
    """Render, tokenize and label rows.

    Args:
        rows: conversations.
        tokenizer: the model's.
        template: the model's.
        max_length: most tokens of a row; None for no limit.
        train_on: "assistant", "last" or "all"; see `mst.data.spans.assistant_spans`.
        truncation_strategy: "delete" leaves longer rows out, "right" cuts off their end and leaves
            out those that then carry no loss.

    Raises:
        DataError: when a row cannot be rendered or carries no loss, or none is left. Names file
            and row, and never quotes it.
    """
    if truncation_strategy not in TRUNCATION_STRATEGIES:
        raise DataError(
            f"--truncation-strategy '{truncation_strategy}' is not one of "
            f"{', '.join(TRUNCATION_STRATEGIES)}. Pass one."
        )
    whole: list[Example] = []
    for first in range(0, len(rows), _BATCH_ROWS):
        batch = rows[first : first + _BATCH_ROWS]
        rendered = [_spans(template, row, train_on) for row in batch]
        texts = tokenizer.encode_batch([text for text, _ in rendered])
        for row, text, (_, spans) in zip(batch, texts, rendered, strict=True):
            whole.append(_example(text, spans, row))
    kept = [_cut(example, max_length, truncation_strategy) for example in whole]
    examples = tuple(example for example in kept if example is not None)
    if not examples:
        raise _nothing_left(whole, max_length, truncation_strategy)
    return Encoded(examples, _stats(whole, examples, max_length))


def _stats(
    whole: Sequence[Example], examples: Sequence[Example], max_length: int | None
) -> EncodeStats:
    lengths = [len(example.input_ids) for example in whole]
    too_long = sum(length > max_length for length in lengths) if max_length is not None else 0
    deleted = len(whole) - len(examples)
    return EncodeStats(
        rows=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        label_tokens=sum(len(e.labels) - e.labels.count(IGNORE) for e in examples),
        longest=max(lengths),
        too_long=too_long,
        deleted=deleted,
        truncated=too_long - deleted,
    )


def _spans(template: ChatTemplate, row: Row, train_on: str) -> tuple[str, tuple[Span, ...]]:
    where = f"{row.file}, row {row.number}"
    try:
        text, spans = assistant_spans(template, row.messages, train_on)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not spans:
        raise DataError(
            f"{where}: no turn carries loss with --train-on {train_on}: 'loss' is false on every "
            "answer it chooses. Remove the row, or set 'loss' to true on one."
        )
    return text, spans


def _example(text: EncodedText, spans: Sequence[Span], row: Row) -> Example:
    ids = array("i", text.ids)
    labels = array("i", [IGNORE]) * len(ids)
    for position in labelled(text.offsets, spans):
        labels[position] = ids[position]
    # Nothing comes before the first token, so nothing predicts it.
    labels[:1] = array("i", [IGNORE] * len(labels[:1]))
    return Example(ids, labels, row)


def labelled(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[int]:
    """Return the positions of the tokens whose characters overlap a span.

    Args:
        offsets: (start, end) in characters of each token, ascending. Tokens of one multi-byte
            character all have that character's offsets.
        spans: ascending (start, end) in characters.
    """
    positions = []
    remaining = iter(spans)
    span = next(remaining, None)
    covered = 0
    for position, (start, end) in enumerate(offsets):
        if start == end:
            # Tokenizers that trim offsets give white space no width: it stands between the
            # former token and here. What has no room even so is a character of its own.
            start, end = (covered, end) if covered < end else (start, end + 1)
        else:
            covered = end
        while span is not None and span[1] <= start:
            span = next(remaining, None)
        if span is None:
            break
        if end > span[0]:
            positions.append(position)
    return positions


def _cut(example: Example, max_length: int | None, strategy: str) -> Example | None:
    if max_length is None or len(example.input_ids) <= max_length:
        return example
    labels = example.labels[:max_length]
    if strategy == "delete" or labels.count(IGNORE) == len(labels):
        return None
    return Example(example.input_ids[:max_length], labels, example.row)


def _nothing_left(whole: Sequence[Example], max_length: int | None, strategy: str) -> DataError:
    if not whole:
        return DataError("Rows to learn from are needed, but none were given. Pass --dataset FILE.")
    lengths = [len(example.input_ids) for example in whole]
    longest, shortest = max(lengths), min(lengths)
    why = "are longer" if strategy == "delete" else "have their answers beyond it"
    return DataError(
        f"--max-length {max_length} leaves no row to learn from: all {len(whole)} {why} (shortest "
        f"{shortest} tokens, longest {longest}). Pass --max-length {longest} to keep them all."
    )
