"""The largest micro-batch, as the memory sees it."""

from __future__ import annotations

from dataclasses import dataclass

from mst.training.batches import KEPT_MULTIPLE, rounded


@dataclass(frozen=True)
class StepShape:
    """The largest micro-batch: what the activations are counted for.

    Attributes:
        tokens: tokens in it, padding included.
        label_tokens: positions whose logits are computed.
        mask_values: values of dense attention masks (tokens squared when packed, else 0).
        rows: rows of the tensors: 1 when packed.
        width: their width; 0 when unknown.
        kept: positions along the width whose logits are computed, in every row; 0 when unknown.
        masked: padded rows have a mask: they are not all of one length.
        image_bytes: of the tensors that a model sees images by.
        alike: every micro-batch of the run has this shape.
    """

    tokens: int
    label_tokens: int
    mask_values: int = 0
    rows: int = 1
    width: int = 0
    kept: int = 0
    masked: bool = True
    image_bytes: int = 0
    alike: bool = False


def row_width(step: StepShape) -> int:
    """Return the width of the micro-batch's tensors."""
    return max(1, step.width or step.tokens // max(1, step.rows))


def logit_columns(step: StepShape) -> int:
    """Return along how many positions of the width logits are computed, in every row.

    Where any row has a label, all rows get logits: unless told, no two rows are taken to have
    labels at the same positions.
    """
    kept = step.kept or min(row_width(step), step.label_tokens)
    return rounded(kept, KEPT_MULTIPLE)


def mask_values(step: StepShape) -> int:
    """Return the values of the attention mask that the layers share; 0 when they need none."""
    if step.mask_values:
        return step.mask_values
    padded = step.rows > 1 and step.masked
    return step.rows * row_width(step) ** 2 if padded else 0
