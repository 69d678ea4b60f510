"""What a model says of sequences: laid out as a micro-batch, and sorted back by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mst.data.encode import IGNORE, Example
from mst.objective import Scored, label_count
from mst.training.batches import Batch, Layout, collate_lines, lines_of
from mst.training.loss import Logits, forward_arguments, label_log_probs
from mst.training.prefixes import beginnings
from mst.training.shared_lines import Line, collate_shared, shared_lines

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Laid:
    """Sequences as one micro-batch, and where each one's targets lie in it.

    Attributes:
        batch: the tensors.
        places: (label tokens,) where `batch.labelled` go in (sequences, longest) flattened.
        weights: (sequences, longest) factor of each.
    """

    batch: Batch
    places: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> Laid:
        """Return the same on `device`."""
        return Laid(
            self.batch.to(device),
            self.places.to(device),
            self.weights.to(device),
        )


def lay_out(
    sequences: Sequence[Example],
    pad_token_id: int,
    layout: Layout,
    lines: Sequence[Sequence[int]] | None = None,
    processor: Path | None = None,
    shares: bool = False,
) -> Laid:
    """Return sequences as one micro-batch.

    Args:
        sequences: what the model reads.
        pad_token_id: fills what is padded.
        layout: of the tensors.
        lines: which sequences lie in each line; default as `lines_of` says.
        processor: directory of the model that reads the sequences' images.
        shares: what sequences begin with alike is computed once, unless `lines` are given; of
            "lines", "alike" and "single" only.
    """
    import torch

    counts = torch.tensor([label_count(each) for each in sequences])
    found = lines_in(sequences, layout, lines, shares)
    order = torch.tensor([number for line in found for number in line.rows])
    if any(any(each.shared) for each in found):
        batch = collate_shared(sequences, found, pad_token_id, layout)
        of = order.repeat_interleave(counts[order])
    else:
        laid = [[sequences[i] for i in line.rows] for line in found]
        batch = collate_lines(laid, pad_token_id, layout, processor)
        of = _owners(batch, found, [len(each.input_ids) for each in sequences])
    longest = max(1, int(counts.max()))
    # Targets lie in the order of the lines, and those of one sequence side by side.
    first = torch.zeros_like(counts)
    first[order] = counts[order].cumsum(0) - counts[order]
    within = torch.arange(batch.label_tokens) - first[of]
    weights = torch.zeros(len(sequences), longest)
    for row, each, count in zip(weights, sequences, counts.tolist(), strict=True):
        row[:count] = 1.0
        if each.weights is not None:
            pairs = zip(each.weights, each.labels, strict=True)
            row[:count] = torch.tensor([weight for weight, label in pairs if label != IGNORE])
    return Laid(batch, of * longest + within, weights)


def lines_in(
    sequences: Sequence[Example],
    layout: Layout,
    lines: Sequence[Sequence[int]] | None = None,
    shares: bool = False,
) -> list[Line]:
    """Return which sequences lie in each line of a micro-batch, and what they share there.

    Args: as of `lay_out`.
    """
    lengths = [len(each.input_ids) for each in sequences]
    if lines is None and shares:
        known = beginnings([each.input_ids for each in sequences])
        return shared_lines(range(len(sequences)), lengths, known, layout)
    if lines is None:
        lines = lines_of(lengths, layout)
    return [Line(tuple(each), (0,) * len(each)) for each in lines]


def _owners(batch: Batch, lines: Sequence[Line], lengths: Sequence[int]) -> torch.Tensor:
    """Return which sequence each label is of, (label tokens,)."""
    import torch

    owners = torch.zeros(batch.input_ids.shape, dtype=torch.long)
    for row, line in zip(owners, lines, strict=True):
        start = 0
        for number in line.rows:
            end = start + lengths[number]
            row[start:end] = number
            start = end
    return owners[:, batch.keep].flatten()[batch.labelled]


def scored(
    model: torch.nn.Module, laid: Laid, how: Logits, scores: bool, temperature: float = 1.0
) -> Scored:
    """Return what a model says of a micro-batch's sequences.

    Args:
        model: a language model, or one with a score for each sequence.
        laid: on the model's device.
        how: its logits are had.
        scores: the model gives scores.
        temperature: that logits are divided by.
    """
    weights = laid.weights
    lengths = (weights > 0).sum(-1).float()
    if scores:
        found = model(**forward_arguments(model, laid.batch)).logits
        nothing = weights.new_zeros(weights.shape)
        return Scored(nothing, weights, lengths, found[:, 0].float())
    values = label_log_probs(model, laid.batch, how, temperature)
    spread = values.new_zeros(weights.numel()).scatter(0, laid.places, values)
    return Scored(spread.view_as(weights), weights, lengths)
