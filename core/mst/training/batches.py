"""Which rows meet in which micro-batch, as a pure function of the seed: resume needs no state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from mst.data.encode import IGNORE as IGNORE_INDEX

if TYPE_CHECKING:
    import torch

    from mst.data.encode import Example

# Above this many tokens a packed micro-batch's dense attention mask costs more than padding saves.
PACKED_TOKENS_AT_MOST = 2048

# Sizes are rounded up to these, because a CPU's kernel library keeps code and scratch space for
# every shape it has met: with free shapes the resident set of SmolLM2 grew from 1.6 to 2.5 GiB in
# 40 steps, with these it stayed at 1.6 GiB, and steps were no slower.
TOKENS_MULTIPLE = 64
KEPT_MULTIPLE = 16


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order in which an epoch visits `rows` rows.

    `random.Random(str)` seeds through SHA-512 and does not depend on the interpreter's hash seed,
    so every machine and Python version gets the same order.
    """
    order = list(range(rows))
    random.Random(f"mst:{seed}:{epoch}").shuffle(order)
    return tuple(order)


def step_micro_batches(
    rows: int, step: int, micro_batch: int, global_batch: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Return the row indices of each micro-batch of optimizer step `step`, counted from 0.

    Which rows a step holds depends on the global batch alone; the micro-batch only cuts them.

    Args:
        rows: training rows in all.
        step: optimizer step, from 0.
        micro_batch: rows a micro-batch; the last one of a step may be smaller.
        global_batch: rows a step, on all devices; the last step of an epoch holds what is left.
        seed: of the order.
    """
    steps_per_epoch = -(-rows // global_batch)
    epoch, index = divmod(step, steps_per_epoch)
    chosen = epoch_order(rows, seed, epoch)[index * global_batch : (index + 1) * global_batch]
    return tuple(chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch))


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch.

    Attributes:
        input_ids: (rows, width) int64; (1, tokens) when packed.
        position_ids: the same shape; restarts with each row.
        attention_mask: (rows, width), 1 for tokens; None when packed or nothing is padded.
            transformers isolates packed rows by position_ids only when there is no mask.
        keep: (kept,) positions along the width whose logits some row needs.
        targets: (rows, kept) the token that each kept position should predict, or -100.
        tokens: tokens that are not padding.
        label_tokens: targets that are not -100.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    keep: torch.Tensor
    targets: torch.Tensor
    tokens: int
    label_tokens: int

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device`."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            None if mask is None else mask.to(device),
            self.keep.to(device),
            self.targets.to(device),
            self.tokens,
            self.label_tokens,
        )


def is_packed(lengths: Sequence[int], packing: bool) -> bool:
    """Return whether rows of these lengths are laid end to end instead of padded."""
    return packing and len(lengths) > 1 and sum(lengths) <= PACKED_TOKENS_AT_MOST


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def batch_shape(lengths: Sequence[int], packing: bool) -> tuple[int, int]:
    """Return (rows, width) of the tensors that `collate` makes of rows of these lengths."""
    if is_packed(lengths, packing):
        return 1, _rounded(sum(lengths), TOKENS_MULTIPLE)
    return len(lengths), _rounded(max(lengths), KEPT_MULTIPLE)


def collate(examples: Sequence[Example], pad_token_id: int, packing: bool) -> Batch:
    """Lay examples end to end in one row (packed), or pad them to the longest at the right.

    Sizes are rounded up as `batch_shape` says.

    Args:
        examples: the micro-batch's rows.
        pad_token_id: fills what is padded; it is masked and carries no loss.
        packing: the model keeps packed rows apart (see `mst.training.isolation`).
    """
    import torch

    lengths = [len(each.input_ids) for each in examples]
    _, width = batch_shape(lengths, packing)
    mask = None
    if is_packed(lengths, packing):
        gap = width - sum(lengths)
        ids = [[*(token for each in examples for token in each.input_ids), *[pad_token_id] * gap]]
        labels = [[*(label for each in examples for label in each.labels), *[IGNORE_INDEX] * gap]]
        # What is rounded up is one more row, which nothing sees and which carries no loss.
        positions = [[i for length in (*lengths, gap) for i in range(length)]]
    else:
        gaps = [width - length for length in lengths]
        ids = [
            [*each.input_ids, *[pad_token_id] * gap]
            for each, gap in zip(examples, gaps, strict=True)
        ]
        labels = [
            [*each.labels, *[IGNORE_INDEX] * gap] for each, gap in zip(examples, gaps, strict=True)
        ]
        positions = [list(range(width)) for _ in examples]
        # A lone row needs no mask: causal attention never looks right, at the padding.
        if len(examples) > 1 and any(gaps):
            mask = torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps])
    # Position i predicts token i + 1. A row's first token has no label, so packed rows never
    # predict across their border.
    shifted = torch.tensor(labels)[:, 1:]
    keep = (shifted != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    extra = _rounded(len(keep), KEPT_MULTIPLE) - len(keep)
    targets = torch.cat([shifted[:, keep], torch.full((len(ids), extra), IGNORE_INDEX)], dim=1)
    keep = torch.cat([keep, torch.zeros(extra, dtype=keep.dtype)])
    return Batch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        attention_mask=mask,
        keep=keep,
        targets=targets,
        tokens=sum(len(each.input_ids) for each in examples),
        label_tokens=int((targets != IGNORE_INDEX).sum()),
    )
