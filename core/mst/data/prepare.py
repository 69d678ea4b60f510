"""From a request to encoded rows: read, split, render, tokenize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mst.data.encode import IGNORE, Encoded, encode
from mst.data.formats import read
from mst.data.labels import label_set
from mst.data.rows import FileFacts, Row
from mst.data.split import split
from mst.data.template import ChatTemplate, load_template
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.request import TrainRequest
from mst.workload import DataFacts, packed

# Without --max-length: long enough for most chats, short enough not to be a surprise in memory.
DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Prepared:
    """Encoded rows, and what they were made with. It lives in memory only.

    Attributes:
        train_rows: the rows that are trained on, before encoding.
        val_rows: the rows held out, before encoding.
        train: encoded.
        val: encoded; None when nothing is held out.
        answers: the set of answers when the data is a classification.
        max_length: the length that was applied.
        packing: rows fill blocks of that length.
    """

    train_rows: tuple[Row, ...]
    val_rows: tuple[Row, ...]
    train: Encoded
    val: Encoded | None
    answers: tuple[str, ...] | None
    max_length: int
    packing: bool
    files: tuple[FileFacts, ...]
    val_files: tuple[FileFacts, ...]
    tokenizer: TextTokenizer
    template: ChatTemplate


def prepare(
    request: TrainRequest, dataset: Sequence[str], model_dir: Path, context: int | None
) -> Prepared:
    """Read and encode the data that a request names.

    Args:
        request: the options of data.
        dataset: the files, with the default filled in.
        model_dir: holds tokenizer.json and the chat template.
        context: the model's longest context in tokens, if known.

    Raises:
        DataError: as the readers, the template and the encoder say.
    """
    tokenizer = load_tokenizer(model_dir)
    template = load_template(model_dir, request.template)
    found = read(dataset)
    if request.val_dataset:
        held_out = read(request.val_dataset)
        train_rows, val_rows, val_files = found.rows, held_out.rows, held_out.files
    else:
        train_at, val_at = split(len(found.rows), request.val_size, request.seed)
        train_rows = tuple(found.rows[i] for i in train_at)
        val_rows = tuple(found.rows[i] for i in val_at)
        val_files = ()
    max_length = request.max_length
    if max_length is None:
        max_length = min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)

    def encoded(rows: Sequence[Row]) -> Encoded:
        return encode(
            rows,
            tokenizer,
            template,
            max_length=max_length,
            train_on=request.train_on,
            truncation_strategy=request.truncation_strategy,
        )

    return Prepared(
        train_rows=train_rows,
        val_rows=val_rows,
        train=encoded(train_rows),
        val=encoded(val_rows) if val_rows else None,
        answers=label_set(train_rows),
        max_length=max_length,
        packing=request.packing,
        files=found.files,
        val_files=val_files,
        tokenizer=tokenizer,
        template=template,
    )


def data_facts(prepared: Prepared) -> DataFacts:
    """Return what the planner needs of the encoded rows."""
    examples = prepared.train.examples
    longest = prepared.train.stats.longest
    facts = DataFacts(
        lengths=tuple(len(each.input_ids) for each in examples),
        label_tokens=tuple(sum(label != IGNORE for label in each.labels) for each in examples),
        val_rows=len(prepared.val.examples) if prepared.val else 0,
        answers=len(prepared.answers) if prepared.answers else None,
        max_length=min(prepared.max_length, longest),
        longest=longest,
        deleted=prepared.train.stats.deleted,
    )
    return packed(facts, prepared.max_length) if prepared.packing else facts
