"""What an evaluation found: figures of one model, or of two on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

from mst.data.rows import FileFacts
from mst.evaluate.figures import Figure


@dataclass(frozen=True)
class Judged:
    """A model that was evaluated.

    Attributes:
        name: as a person knows it.
        model_sha256: fingerprint of the base or whole model.
        step: optimizer steps that it was trained for; None when unknown.
        dtype: of the matrix products.
        loss_tokens_per_second: read while the loss was computed, padding not counted.
        answer_tokens_per_second: generated; None when nothing was.
        seconds: that all took.
    """

    name: str
    model_sha256: str
    step: int | None
    dtype: str
    loss_tokens_per_second: float | None
    answer_tokens_per_second: float | None
    seconds: float


@dataclass(frozen=True)
class EvalReport:
    """An evaluation as `mst eval --json` prints it. It holds no row and no answer.

    Attributes:
        mst_version: that made it.
        created: UTC, ISO 8601.
        device: as torch calls it.
        rows_of: where the rows came from.
        data: the files, with their hashes.
        rows: that were judged.
        left_out: rows that were not: too long, without an answer, or past --limit.
        tokens: of the rows.
        label_tokens: of these, what the loss is over.
        model: what was evaluated.
        compared_with: what it is held against; None for nothing.
        figures: one a line of the table.
        resamples: of the bootstrap.
        seed: of its draws.
        notes: what a reader should know.
    """

    mst_version: str
    created: str
    device: str
    rows_of: str
    data: tuple[FileFacts, ...]
    rows: int
    left_out: int
    tokens: int
    label_tokens: int
    model: Judged
    compared_with: Judged | None
    figures: tuple[Figure, ...]
    resamples: int
    seed: int
    notes: tuple[str, ...] = ()
