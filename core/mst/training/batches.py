"""The tensors of a micro-batch: rows end to end where the model keeps them apart, else padded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mst.data.encode import IGNORE as IGNORE_INDEX
from mst.training.image_inputs import image_inputs
from mst.training.packing import even_shares, first_fit_decreasing

if TYPE_CHECKING:
    import torch

    from mst.data.encode import Example

# How the rows of a micro-batch lie in its tensors: each in a line of its own, padded; end to end in
# one line, for kernels that are told where rows begin; end to end in lines of even width; and for
# compiled layers in such lines that are always several and positions always restart in, or always
# in one line, for attention that costs what rows see and not their line's width.
Layout = Literal["padded", "line", "lines", "alike", "single"]

# A line's tokens attend over its whole width, under a mask. At this width that takes as long as all
# else (SmolLM2-135M on two AMX cores: 1000; wider models: later).
ATTENTION_WIDTH = 2048

# Sizes are rounded up to these, because a CPU's kernel library keeps code and scratch space for
# every shape it has met: with free shapes the resident set of SmolLM2 grew from 1.6 to 2.5 GiB in
# 40 steps, with these it stayed at 1.6 GiB, and steps were no slower.
TOKENS_MULTIPLE = 64
SINGLE_MULTIPLE = 32
KEPT_MULTIPLE = 16
# In float32 32 MiB, a server core's share of the last cache. Products have at least so many rows:
# with fewer, reading the head's weights takes longer than computing with them.
CHUNK_LOGITS = 2**23
CHUNK_ROWS_AT_LEAST = 64


def layout_of(packing: bool, attention: str, compiled: bool = False) -> Layout:
    """Return how rows are laid out.

    Args:
        packing: the model keeps packed rows apart (see `mst.training.isolation`).
        attention: transformers' implementation. FlashAttention's kernels take the rows' lengths
            instead of a mask, but transformers finds them in a tensor of one line only.
        compiled: its layers are (see `mst.training.compilation`).
    """
    if not packing:
        return "padded"
    if compiled:
        return "alike"
    return "line" if attention.startswith("flash_attention") else "lines"


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch.

    Attributes:
        input_ids: (lines, width) int64.
        position_ids: the same shape; restarts with each row of a packed line.
        attention_mask: (lines, width), 1 for tokens; None where positions keep rows apart, or
            nothing is padded. transformers goes by position_ids only when there is no mask. Where
            rows share their beginnings (lines, 1, width, width), which place sees which.
        keep: (kept,) positions along the width whose logits some line needs.
        targets: (lines, kept) the token that each kept position should predict, or -100; one of
            them where there are several.
        labelled: (label_tokens,) places in `targets`, flattened, of those that are not -100, row
            by row as the rows lie in the lines; a place comes as often as it has labels.
        tokens: tokens that are not padding.
        label_tokens: targets that are not -100.
        images: what the model sees images by, as arguments of its forward pass.
        labels: (label_tokens,) the token that each of `labelled` should predict, where a place may
            have several because rows share their beginnings; else None.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    keep: torch.Tensor
    targets: torch.Tensor
    labelled: torch.Tensor
    tokens: int
    label_tokens: int
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)
    labels: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device`."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            None if mask is None else mask.to(device),
            self.keep.to(device),
            self.targets.to(device),
            self.labelled.to(device),
            self.tokens,
            self.label_tokens,
            {name: each.to(device) for name, each in self.images.items()},
            None if self.labels is None else self.labels.to(device),
        )


def lines_of(lengths: Sequence[int], layout: Layout) -> list[list[int]]:
    """Return which rows of these lengths lie in each line of the tensors.

    Lines of even width are as wide as is cheapest: narrow ones waste little attention, wide ones
    little padding.
    """
    if layout == "padded" or len(lengths) == 1:
        return [[row] for row in range(len(lengths))]
    if layout in ("line", "single"):
        return [list(range(len(lengths)))]
    longest, whole = (rounded(f(lengths), TOKENS_MULTIPLE) for f in (max, sum))
    lines: list[list[int]] = []
    least = math.inf
    for width in sorted({longest, min(2 * longest, whole), whole}):
        # Full lines would be the fewest.
        if cost(-(-sum(lengths) // width), width) >= least:
            continue
        found = first_fit_decreasing(lengths, width)
        if cost(len(found), width) < least:
            lines, least = found, cost(len(found), width)
    if layout == "alike" and len(lines) == 1:
        return even_shares(lengths, -(-len(lengths) // 2))
    return lines


def cost(lines: int, width: int) -> float:
    """Return what a micro-batch costs: its tokens, and their attention over their line's width."""
    return lines * width * (1 + width / ATTENTION_WIDTH)


def rounded(size: int, multiple: int) -> int:
    """Return a size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def width_multiple(layout: Layout) -> int:
    """Return what the width of packed lines is a multiple of."""
    return SINGLE_MULTIPLE if layout == "single" else TOKENS_MULTIPLE


def chunk_rows(vocabulary: int) -> int:
    """Return how many labels' logits there are at a time."""
    fitting = CHUNK_LOGITS // vocabulary // KEPT_MULTIPLE * KEPT_MULTIPLE
    return max(CHUNK_ROWS_AT_LEAST, fitting)


@dataclass(frozen=True)
class BatchShape:
    """The tensors of a micro-batch.

    Attributes:
        lines: their rows.
        width: of each.
        packed: rows share a line.
        masked: they are padded, and a mask says where.
    """

    lines: int
    width: int
    packed: bool
    masked: bool


def batch_shape(lines: Sequence[Sequence[int]], layout: Layout) -> BatchShape:
    """Return the shape of the tensors that `collate` makes of lines of rows of these lengths."""
    packed = any(len(line) > 1 for line in lines) or (layout == "alike" and len(lines) > 1)
    widths = [sum(line) for line in lines]
    width = rounded(max(widths), width_multiple(layout) if packed else KEPT_MULTIPLE)
    # Causal attention never looks right, at the padding, so a lone row needs no mask, nor do rows
    # of a model that goes by positions. Others get one.
    masked = layout == "padded" and len(lines) > 1 and min(widths) < width
    return BatchShape(len(lines), width, packed, masked)


def collate(
    examples: Sequence[Example], pad_token_id: int, layout: Layout, processor: Path | None = None
) -> Batch:
    """Lay examples out in the lines of one micro-batch, as `lines_of` says.

    Args:
        examples: the micro-batch's rows.
        pad_token_id: fills what is padded; it carries no loss, and no row sees it.
        layout: from `layout_of`; "padded" where a row has images.
        processor: directory of the model that reads the rows' images.
    """
    lines = lines_of([len(each.input_ids) for each in examples], layout)
    laid = [[examples[row] for row in line] for line in lines]
    return collate_lines(laid, pad_token_id, layout, processor)


def collate_lines(
    lines: Sequence[Sequence[Example]],
    pad_token_id: int,
    layout: Layout,
    processor: Path | None = None,
) -> Batch:
    """Lay the examples of each line end to end, and pad the lines to one width at the right.

    Sizes are rounded up as `batch_shape` says.
    """
    import torch

    lengths = [[len(each.input_ids) for each in line] for line in lines]
    shape = batch_shape(lengths, layout)
    gaps = [shape.width - sum(line) for line in lengths]
    ids = [
        [*(token for each in line for token in each.input_ids), *[pad_token_id] * gap]
        for line, gap in zip(lines, gaps, strict=True)
    ]
    labels = [
        [*(label for each in line for label in each.labels), *[IGNORE_INDEX] * gap]
        for line, gap in zip(lines, gaps, strict=True)
    ]
    if shape.packed:
        # What is padded is one more row, which nothing sees.
        positions = [
            [i for length in (*line, gap) for i in range(length)]
            for line, gap in zip(lengths, gaps, strict=True)
        ]
    else:
        # Positions that go on tell transformers that there is nothing to keep apart.
        positions = [list(range(shape.width)) for _ in lines]
    mask = None
    if shape.masked:
        mask = torch.tensor([[1] * (shape.width - gap) + [0] * gap for gap in gaps])
    # Position i predicts token i + 1. A row's first token has no label, so packed rows never
    # predict across their border.
    shifted = torch.tensor(labels)[:, 1:]
    keep = (shifted != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    extra = rounded(len(keep), KEPT_MULTIPLE) - len(keep)
    targets = torch.cat([shifted[:, keep], torch.full((len(ids), extra), IGNORE_INDEX)], dim=1)
    keep = torch.cat([keep, torch.zeros(extra, dtype=keep.dtype)])
    labelled = (targets != IGNORE_INDEX).flatten().nonzero()[:, 0]
    input_ids = torch.tensor(ids)
    return Batch(
        input_ids=input_ids,
        position_ids=torch.tensor(positions),
        attention_mask=mask,
        keep=keep,
        targets=targets,
        labelled=labelled,
        tokens=sum(sum(line) for line in lengths),
        label_tokens=len(labelled),
        images=image_inputs([each for line in lines for each in line], input_ids, processor),
    )
