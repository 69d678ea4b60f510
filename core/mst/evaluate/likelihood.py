"""How likely a model finds the rows: the cross-entropy of each row's label tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mst.data.encode import IGNORE, Example
from mst.evaluate.batching import batches, in_passes

if TYPE_CHECKING:
    import torch


def row_losses(
    model: torch.nn.Module,
    examples: Sequence[Example],
    pad_token_id: int,
    dtype: torch.dtype,
    rows_at_most: int,
    tokens_at_most: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, float]]:
    """Return of each example the sum of its tokens' losses, and the tokens that it is over.

    Their sums' ratio over all rows is the held-out loss of training. Where tokens have weights,
    both are weighted.

    Args:
        model: a causal language model of transformers, on its device.
        examples: encoded rows.
        pad_token_id: fills what is padded.
        dtype: of the matrix products.
        rows_at_most: in one pass.
        tokens_at_most: in one pass.
        progress: told after each pass how many examples are done.
    """
    import torch

    from mst.training.batches import collate
    from mst.training.loss import compute_in, logits_of, token_log_probs

    device = next(model.parameters()).device
    how = logits_of(model)

    def work(places: list[int]) -> list[tuple[float, float]]:
        chosen = [examples[place] for place in places]
        batch = collate(chosen, pad_token_id, "padded")
        weights = _weights(chosen, batch.input_ids.shape[1])[:, 1:][:, batch.keep]
        weights = weights * (batch.targets != IGNORE)
        with torch.inference_mode(), compute_in(model, device.type, dtype):
            losses = -token_log_probs(model, batch.to(device), how)
            sums = (losses * weights.to(device)).sum(1).tolist()
        return list(zip(sums, weights.sum(1).tolist(), strict=True))

    found: dict[int, tuple[float, float]] = {}
    made = batches([len(each.input_ids) for each in examples], rows_at_most, tokens_at_most)
    for places, results in in_passes(device, made, work):
        found |= zip(places, results, strict=True)
        progress(len(found))
    return [found[place] for place in range(len(examples))]


def _weights(examples: Sequence[Example], width: int) -> torch.Tensor:
    """Return (rows, width) the weight of each token's loss; 1 where a row has none."""
    import torch

    weights = torch.ones(len(examples), width)
    for row, each in zip(weights, examples, strict=True):
        if each.weights is not None:
            row[: len(each.weights)] = torch.tensor(each.weights)
    return weights
