"""From a request to encoded rows: read, split, render, tokenize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mst.data.bad_rows import BadRows
from mst.data.encode import Encoded, Example, encode, encode_row
from mst.data.formats import Reading, check_columns_used, read
from mst.data.images import row_images
from mst.data.labels import label_set
from mst.data.refusals import Place, RowError
from mst.data.rows import DataSet, FileFacts, Row
from mst.data.split import split
from mst.data.streamed import check_streaming, stream
from mst.data.template import ChatTemplate, load_template
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.data.usable import check_context, fit_rows, usable, with_known_answers
from mst.model.processor import image_tokens
from mst.objective import Objective, label_count, objective_work
from mst.privacy.units import grouped
from mst.request import TrainRequest
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training.objectives import find_objective
from mst.training.prefixes import beginnings
from mst.workload import DataFacts, packed

# Without --max-length: long enough for most chats, short enough not to be a surprise in memory.
DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Encoding:
    """How rows are encoded; as the arguments of `mst.data.encode.encode`."""

    tokenizer: TextTokenizer
    template: ChatTemplate
    max_length: int
    train_on: str
    truncation_strategy: str


@dataclass(frozen=True)
class Prepared:
    """Encoded rows, and what they were made with. It lives in memory only.

    Attributes:
        train_rows: the rows that are trained on, before encoding; none of those that are streamed.
        val_rows: the rows held out, before encoding.
        train: encoded; with streamed rows its figures are those of the sample.
        val: encoded; None when nothing is held out.
        answers: the set of answers when the data is a classification.
        max_length: the length that was applied.
        packing: rows fill blocks of that length.
        objective: what the rows are for.
        sample: of streamed rows, some that were encoded for the plan; None where all rows are held.
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
    objective: Objective
    sample: tuple[Example, ...] | None = None


def prepare(
    request: TrainRequest,
    dataset: Sequence[str],
    model_dir: Path,
    context: int | None,
    objective: Objective | None = None,
    keys: KeyRing = NO_KEYS,
) -> Prepared:
    """Read and encode the data that a request names.

    Args:
        request: the options of data.
        dataset: as the request has it, with the default filled in.
        model_dir: holds tokenizer.json and the chat template.
        context: the model's longest context in tokens, if known.
        objective: what the rows are for; default the built-in one that the request names.
        keys: open encrypted files.

    Raises:
        EncryptionError: data are encrypted, and can't be opened or are not as they were written.
        DataError: as the readers, the template and the encoder say, or rows are no use to the
            objective.
    """
    objective = objective or find_objective(request)
    tokenizer = load_tokenizer(model_dir)
    template = load_template(model_dir, request.template)
    reading = reading_of(request, keys)
    max_length = request.max_length
    if max_length is None:
        max_length = min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    encoding = Encoding(
        tokenizer,
        template,
        max_length,
        objective.train_on or request.train_on,
        request.truncation_strategy,
    )
    if request.streaming:
        return _streamed(request, dataset, reading, objective, encoding)
    found = read(dataset, reading)
    train_rows, held_out = parted(request, found, reading)
    val_rows, val_files = held_out.rows, held_out.files
    check_columns_used(reading, [each.columns for each in (*found.files, *val_files)])
    answers = label_set(train_rows) if request.task == "sft" else None
    bad = BadRows(request.on_bad_row)
    train_rows = fit_rows(objective, train_rows, bad)
    val_rows = fit_rows(objective, val_rows, bad)
    train = _encoded(train_rows, objective, encoding, bad)
    val = _encoded(val_rows, objective, encoding, bad) if val_rows else None
    check_context(objective, (*train.examples, *(val.examples if val else ())), context)
    return Prepared(
        train_rows=train_rows,
        val_rows=val_rows,
        train=train,
        val=val,
        answers=answers,
        max_length=max_length,
        packing=request.packing,
        files=bad.recorded(found.files),
        val_files=bad.recorded(val_files),
        tokenizer=tokenizer,
        template=template,
        objective=objective,
    )


def reading_of(request: TrainRequest, keys: KeyRing = NO_KEYS) -> Reading:
    """Return how a request's data is read."""
    return Reading(
        request.columns,
        request.on_bad_row,
        request.dataset_info,
        request.seed,
        keys,
        request.dp_unit,
    )


def parted(
    request: TrainRequest, found: DataSet, reading: Reading
) -> tuple[tuple[Row, ...], DataSet]:
    """Return the rows that are trained on, and those held out with the files of their own."""
    if not request.val_dataset:
        # A unit is held out whole, and --val-size counts units then.
        units = [[i] for i in range(len(found.rows))]
        if request.dp_unit is not None:
            units = grouped(found.rows)
        train_at, val_at = split(len(units), request.val_size, request.seed)
        held_out = DataSet(tuple(found.rows[i] for unit in val_at for i in units[unit]), ())
        return tuple(found.rows[i] for unit in train_at for i in units[unit]), held_out
    held_out = read(request.val_dataset, replace(reading, option="--val-dataset"))
    answers = label_set(found.rows) if request.task == "sft" else None
    if answers and request.label_accuracy != "off":
        held_out = with_known_answers(held_out, answers, request.on_bad_row)
    return found.rows, held_out


def _encoded(
    rows: Sequence[Row], objective: Objective, encoding: Encoding, bad: BadRows
) -> Encoded:
    how = encoding
    found = encode(
        rows,
        how.tokenizer,
        how.template,
        how.max_length,
        how.train_on,
        how.truncation_strategy,
        bad,
    )
    return usable(objective, found)


def _streamed(
    request: TrainRequest,
    dataset: Sequence[str],
    reading: Reading,
    objective: Objective,
    encoding: Encoding,
) -> Prepared:
    """Return rows that are encoded when they are needed, with a sample that stands for them."""
    how = encoding

    def one(row: Row) -> list[Example]:
        if row_images(row):
            raise RowError(
                Place(row.file, row.number),
                "the row has images, which --streaming does not read",
                "Leave it out: an image is loaded when its batch is made in any case.",
            )
        return encode_row(
            row, how.tokenizer, how.template, how.max_length, how.train_on, how.truncation_strategy
        )

    check_streaming(request)
    found = stream(request, dataset, reading, objective, one)
    # Of the sample nothing is recorded: its rows are counted when their steps ask for them.
    unrecorded, bad = BadRows(request.on_bad_row), BadRows(request.on_bad_row)
    rows = fit_rows(objective, found.sample, unrecorded)
    sample = _encoded(rows, objective, encoding, unrecorded)
    val_rows = fit_rows(objective, found.val, bad)
    val = _encoded(val_rows, objective, encoding, bad) if val_rows else None
    return Prepared(
        train_rows=(),
        val_rows=val_rows,
        train=replace(sample, examples=found.train),
        val=val,
        answers=None,
        max_length=how.max_length,
        packing=False,
        files=bad.recorded(found.files),
        val_files=bad.recorded(found.val_files),
        tokenizer=how.tokenizer,
        template=how.template,
        objective=objective,
        sample=tuple(sample.examples),
    )


def has_images(prepared: Prepared) -> bool:
    """Return whether any row, held out or not, has an image."""
    return any(row_images(row) for row in (*prepared.train_rows, *prepared.val_rows))


def data_facts(prepared: Prepared, private: bool = False) -> DataFacts:
    """Return what the planner needs of the encoded rows.

    Args:
        prepared: the rows.
        private: count the units that differential privacy protects.
    """
    streamed = prepared.sample is not None
    examples, objective = prepared.sample or prepared.train.examples, prepared.objective
    longest = prepared.train.stats.longest
    parts, counts, sequences = [], [], []
    for each in examples:
        read = objective.sequences(each)
        sequences += [one.input_ids for one in read]
        parts.append(tuple(len(one.input_ids) for one in read))
        counts.append(0 if objective.scores else sum(map(label_count, read)))
    facts = DataFacts(
        lengths=tuple(map(sum, parts)),
        label_tokens=tuple(counts),
        val_rows=len(prepared.val.examples) if prepared.val else 0,
        answers=len(prepared.answers) if prepared.answers else None,
        max_length=prepared.max_length if streamed else min(prepared.max_length, longest),
        longest=longest,
        deleted=prepared.train.stats.deleted,
        parts=tuple(parts),
        sequences=max(map(len, parts)),
        unusable=prepared.train.unusable,
        sampled_from=len(prepared.train.examples) if streamed else None,
        units=len(grouped(each.row for each in examples)) if private else 0,
        objective=objective_work(objective),
        beginnings=beginnings(sequences),
        **_image_facts(prepared),
    )
    return packed(facts, prepared.max_length) if prepared.packing else facts


def _image_facts(prepared: Prepared) -> dict[str, Any]:
    directory = prepared.template.images
    if directory is None or not has_images(prepared):
        return {}
    return {
        "images": sum(len(row_images(row)) for row in (*prepared.train_rows, *prepared.val_rows)),
        "image_bytes": tuple(
            sum(image_tokens(directory, one.width, one.height).tensor_bytes for one in each.images)
            for each in prepared.train.examples
        ),
    }
