"""From conversations to token ids with labels."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mst.data.bad_rows import BadRows
from mst.data.expansion import expanded
from mst.data.images import Image, row_images
from mst.data.offsets import labelled
from mst.data.refusals import Place, RowError
from mst.data.rows import Message, Row
from mst.data.spans import Span, assistant_spans
from mst.data.template import ChatTemplate
from mst.data.tokens import EncodedText, TextTokenizer
from mst.data.truncation import TRUNCATION_STRATEGIES, fitting, length
from mst.errors import DataError

# torch's cross entropy leaves this label out.
IGNORE = -100
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
        weights: factor of each token's loss, of the same length, 0 where it carries none; None
            where all are 1.
        rejected: of a preference, the worse conversation; this one is the better.
        images: that stand among the tokens, in their order.
    """

    input_ids: array[int] = field(repr=False)
    labels: array[int] = field(repr=False)
    row: Row = field(repr=False)
    weights: array[float] | None = field(default=None, repr=False)
    rejected: Example | None = field(default=None, repr=False)
    images: tuple[Image, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class EncodeStats:
    """What became of the rows.

    Attributes:
        rows: examples that are left.
        tokens: their tokens, those of the worse conversation of a preference included.
        label_tokens: those of them that carry loss.
        longest: tokens of the longest row, before any was cut or left out.
        too_long: rows longer than `max_length`.
        deleted: rows left out, because too long or because cutting left nothing to learn.
        truncated: rows of which a part was cut off.
        divided: plain texts that were cut into pieces; nothing of them is lost.
    """

    rows: int
    tokens: int
    label_tokens: int
    longest: int
    too_long: int
    deleted: int
    truncated: int
    divided: int = 0


@dataclass(frozen=True)
class Encoded:
    """Examples in the order of their rows.

    `unusable` counts those that were left out because the objective can't learn from them.
    """

    examples: Sequence[Example]
    stats: EncodeStats
    unusable: int = 0


def encode(
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    max_length: int | None,
    train_on: str = "assistant",
    truncation_strategy: str = "delete",
    bad: BadRows | None = None,
) -> Encoded:
    """Render, tokenize and label rows.

    In both conversations of a preference the turns after their common beginning carry loss; with
    a KTO label the last answer does. Plain text carries loss throughout, and is cut into pieces
    of `max_length`.

    Args:
        rows: conversations, preferences or plain texts.
        tokenizer: the model's.
        template: the model's.
        max_length: most tokens of a row; None for no limit.
        train_on: "assistant", "last" or "all"; see `mst.data.spans.assistant_spans`.
        truncation_strategy: of conversations: "delete" leaves longer rows out, "right" cuts off
            their end and "left" their beginning; a row in which no loss is left is left out. A
            row with images is left out in any case.
        bad: told of rows that cannot be rendered or carry no loss; None makes them errors.

    Raises:
        RowError: a row cannot be rendered or carries no loss. Names file and row, and never quotes
            it.
        DataError: no row is left.
    """
    if truncation_strategy not in TRUNCATION_STRATEGIES:
        raise DataError(
            f"--truncation-strategy '{truncation_strategy}' is not one of "
            f"{', '.join(TRUNCATION_STRATEGIES)}. Pass one."
        )
    examples: list[Example] = []
    lengths: list[int] = []
    deleted = divided = 0
    bad = bad or BadRows()
    for first in range(0, len(rows), _BATCH_ROWS):
        batch = rows[first : first + _BATCH_ROWS]
        for whole in _renderable(batch, tokenizer, template, train_on, bad):
            kept = fitting(whole, max_length, truncation_strategy)
            lengths.append(length(whole))
            deleted += not kept
            divided += len(kept) > 1
            examples += kept
    if rows and not lengths:
        raise bad.none_left()
    if not examples:
        raise _nothing_left(lengths, max_length, truncation_strategy)
    too_long = sum(length > max_length for length in lengths) if max_length is not None else 0
    both = [each for e in examples for each in (e, e.rejected) if each is not None]
    stats = EncodeStats(
        rows=len(examples),
        tokens=sum(len(each.input_ids) for each in both),
        label_tokens=sum(len(each.labels) - each.labels.count(IGNORE) for each in both),
        longest=max(lengths),
        too_long=too_long,
        deleted=deleted,
        truncated=too_long - deleted - divided,
        divided=divided,
    )
    return Encoded(tuple(examples), stats)


def encode_row(
    row: Row,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    max_length: int,
    train_on: str,
    truncation_strategy: str,
) -> list[Example]:
    """Return what is kept of one row, as `encode` would; nothing where it is too long.

    Raises:
        DataError: as `encode`, of the row alone.
    """
    (whole,) = _whole([row], tokenizer, template, train_on)
    return fitting(whole, max_length, truncation_strategy)


def _renderable(
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    train_on: str,
    bad: BadRows,
) -> Iterator[Example]:
    """Yield the example of each row, uncut; what can't be rendered goes to `bad`."""
    try:
        found = list(_whole(rows, tokenizer, template, train_on))
    except RowError as error:
        if len(rows) == 1 or bad.on_bad_row == "error":
            bad.add(error)
            return
    else:
        yield from found
        return
    for row in rows:
        yield from _renderable([row], tokenizer, template, train_on, bad)


def _whole(
    rows: Sequence[Row], tokenizer: TextTokenizer, template: ChatTemplate, train_on: str
) -> Iterator[Example]:
    """Yield the example of each row, uncut."""
    rendered = [each for row in rows for each in _rendered(template, row, train_on)]
    texts = iter(tokenizer.encode_batch([text for text, _ in rendered]))
    spans = iter([spans for _, spans in rendered])
    documents = [row.text for row in rows if row.text is not None]
    ids = iter(tokenizer.encode_documents(documents))
    for row in rows:
        if row.text is not None:
            whole = array("i", next(ids))
            yield Example(whole, without_first(whole[:]), row)
        else:
            example = _example(next(texts), next(spans), row)
            worse = _example(next(texts), next(spans), row) if row.rejected else None
            yield example if worse is None else replace(example, rejected=worse)


def _rendered(
    template: ChatTemplate, row: Row, train_on: str
) -> Iterator[tuple[str, tuple[Span, ...]]]:
    """Yield the text and the spans of a row's conversations: one, or two of a preference."""
    if row.text is not None:
        return
    if row.rejected:
        pairs = zip(row.messages, row.rejected, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if common is None:
            common = min(len(row.messages), len(row.rejected))
        yield _spans(template, row, row.messages, "assistant", common)
        yield _spans(template, row, row.rejected, "assistant", common)
    else:
        train_on = train_on if row.desirable is None else "last"
        yield _spans(template, row, row.messages, train_on)


def _spans(
    template: ChatTemplate, row: Row, messages: Sequence[Message], train_on: str, first: int = 0
) -> tuple[str, tuple[Span, ...]]:
    where = Place(row.file, row.number)
    try:
        text, spans = assistant_spans(template, messages, train_on, row.tools, first)
        if images := row_images(row):
            text, spans = expanded(template, text, spans, images)
    except DataError as error:
        raise RowError(where, str(error).removesuffix("."), "") from None
    if not spans and row.rejected:
        raise RowError(
            where,
            "the better and the worse conversation must both go on with an answer of their own "
            "after the turns they share, but one has none that carries loss",
            "Mend the row, or remove it.",
        )
    if not spans:
        raise RowError(
            where,
            f"no turn carries loss with --train-on {train_on}: there is no answer, or 'loss' is "
            "false on every one it chooses",
            "Remove the row, or set 'loss' to true on one.",
        )
    return text, spans


def _example(text: EncodedText, spans: Sequence[Span], row: Row) -> Example:
    ids = array("i", text.ids)
    labels = array("i", [IGNORE]) * len(ids)
    weighted = any(span.weight != 1 for span in spans)
    weights = array("f", [0.0]) * len(ids) if weighted else None
    for position, place in labelled(text.offsets, spans):
        labels[position] = ids[position]
        if weights is not None:
            weights[position] = spans[place].weight
    return Example(ids, without_first(labels), row, weights, images=row_images(row))


def without_first(labels: array[int]) -> array[int]:
    """Return labels whose first is ignored: nothing comes before that token to predict it."""
    labels[:1] = array("i", [IGNORE] * len(labels[:1]))
    return labels


def _nothing_left(lengths: Sequence[int], max_length: int | None, strategy: str) -> DataError:
    if not lengths:
        return DataError("Rows to learn from are needed, but none were given. Pass --dataset FILE.")
    longest, shortest = max(lengths), min(lengths)
    why = {
        "delete": "are longer",
        "right": "have their answers beyond it",
        "left": "have no token to learn in it",
    }[strategy]
    return DataError(
        f"--max-length {max_length} leaves no row to learn from: all {len(lengths)} {why} "
        f"(shortest {shortest} tokens, longest {longest}). Pass --max-length {longest} to keep "
        "them all."
    )
