"""The rows as one model reads them: encoded with its tokenizer and its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mst.data.bad_rows import BadRows
from mst.data.encode import Example, encode
from mst.data.images import row_images
from mst.data.rows import Row
from mst.data.template import ChatTemplate, load_template
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.durable import sha256
from mst.errors import EvaluationError
from mst.evaluate.job import EvalJob, Subject


@dataclass(frozen=True)
class Encoding:
    """A model's tokenizer and template, and what they make of the rows.

    Attributes:
        tokenizer: the model's.
        template: the model's, or the file that its run was trained with.
        fingerprint: alike for two models that read the same tokens.
        examples: by a row's place; of a plain text the pieces of it. Rows that are too long
            are left out.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate
    fingerprint: str
    examples: Mapping[int, tuple[Example, ...]] = field(repr=False)


def encode_rows(
    rows: Sequence[Row], job: EvalJob, subject: Subject, on_bad_row: str = "error"
) -> Encoding:
    """Encode rows as the subject was trained to read them.

    Args:
        rows: to judge by.
        job: says how.
        subject: the model.
        on_bad_row: "skip" leaves rows out that its template refuses.

    Raises:
        MstError: as the tokenizer, the template and the encoder say.
    """
    for row in rows:
        if row_images(row):
            raise EvaluationError(
                f"{row.file}, row {row.number}: the row has images, and mst eval judges text alone."
                " `mst train` measures the loss of held-out rows with images; give rows without."
            )
    directory = Path(subject.model.tokenizer)
    tokenizer = load_tokenizer(directory)
    template = load_template(directory, subject.model.template)
    length = min(job.max_length, subject.context or job.max_length)
    places = {id(row): place for place, row in enumerate(rows)}
    examples: dict[int, tuple[Example, ...]] = {}
    encoded = encode(
        rows,
        tokenizer,
        template,
        length,
        job.train_on,
        job.truncation_strategy,
        BadRows(on_bad_row),
    )
    for each in encoded.examples:
        place = places[id(each.row)]
        examples[place] = (*examples.get(place, ()), each)
    fingerprint = sha256(directory / "tokenizer.json") + template.source
    return Encoding(tokenizer, template, fingerprint, examples)


def kept_by_all(encodings: Sequence[Encoding]) -> tuple[int, ...]:
    """Return the places of the rows that every model can read, ascending.

    Raises:
        EvaluationError: there are none.
    """
    kept = set(encodings[0].examples).intersection(*(each.examples for each in encodings[1:]))
    if not kept:
        raise EvaluationError(
            "no row is short enough for both models, so they can't be compared. Pass a larger"
            " --max-length, or shorter rows."
        )
    return tuple(sorted(kept))
