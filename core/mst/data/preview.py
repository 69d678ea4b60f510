"""Which tokens of a row carry loss, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mst.data.encode import IGNORE, Example, encode
from mst.data.rows import Row
from mst.data.template import ChatTemplate
from mst.data.tokens import TextTokenizer
from mst.errors import DataError
from mst.objective import Objective
from mst.request import TrainRequest

# What a token that ends within a character decodes to.
_CUT = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """One token, or the tokens of one character, as text.

    Attributes:
        text: what they stand for, control characters written out.
        ids: of the tokens.
        weight: factor of their loss; 0 where they carry none.
    """

    text: str = field(repr=False)
    ids: tuple[int, ...] = field(repr=False)
    weight: float


@dataclass(frozen=True)
class Preview:
    """What becomes of a row.

    Attributes:
        row: it.
        examples: what is trained on; several where a text is divided, none when it is left out.
        refusal: why `mst train` would refuse it, "" when it would not.
    """

    row: Row
    examples: tuple[Example, ...]
    refusal: str


def preview(
    row: Row,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    max_length: int,
    request: TrainRequest,
    objective: Objective,
) -> Preview:
    """Encode one row as a training run would."""
    lacking = objective.lacks(row)
    if lacking:
        return Preview(row, (), f"for --task {objective.name}, the row {lacking}.")
    try:
        found = encode(
            [row],
            tokenizer,
            template,
            max_length=max_length,
            train_on=objective.train_on or request.train_on,
            truncation_strategy=request.truncation_strategy,
        )
    except DataError as error:
        return Preview(row, (), str(error))
    return Preview(row, tuple(found.examples), "")


def pieces(example: Example, tokenizer: TextTokenizer) -> Iterator[Piece]:
    """Yield the tokens of an example as text, those of one character together."""
    before = start = 0
    ids: Sequence[int] = example.input_ids
    for end in range(1, len(ids) + 1):
        # Some decoders drop the space before a text's first token: the piece before leads.
        lead, text = (tokenizer.decode(ids[before:stop]) for stop in (start, end))
        text = text.removeprefix(lead)
        if _CUT in text and end < len(ids) and end - start < 4:  # UTF-8 takes up to four bytes
            continue
        weights = [_weight(example, place) for place in range(start, end)]
        yield Piece(_visible(text), tuple(ids[start:end]), max(weights))
        before, start = start, end


def _weight(example: Example, place: int) -> float:
    if example.labels[place] == IGNORE:
        return 0.0
    return 1.0 if example.weights is None else example.weights[place]


def _visible(text: str) -> str:
    """Write control characters out: a row must not steer the terminal. Line breaks stay."""
    return "".join(
        each if each == "\n" or each.isprintable() else f"\\x{ord(each):02x}" for each in text
    )
