"""Which rows share a pass: of like length, and no more than memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from mst.model.facts import ModelFacts

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DEFAULT_ROWS = 16
# Where nobody knows what is free: about what a phone-sized GPU has.
_FREE_BYTES = 4 << 30
# Of what is left beside the weights; the rest is for what is not counted here.
_SHARE = 0.5


def token_budget(facts: ModelFacts, free_bytes: int | None, dtype_bytes: int) -> tuple[int, int]:
    """Return how many padded tokens fit into one pass: of a loss, and of generation.

    A loss holds logits in the model's dtype, in float32 and their logarithms; generation holds
    keys and values, twice while they grow. Both hold some vectors of the residual stream.

    Args:
        facts: the model's.
        free_bytes: of the device; None when unknown.
        dtype_bytes: of a weight.
    """
    free = _FREE_BYTES if free_bytes is None else free_bytes
    left = max(0.0, free - facts.parameters * dtype_bytes) * _SHARE
    stream = 16 * facts.hidden_size * 4
    heads = facts.key_value_heads * facts.head_dim or facts.hidden_size
    logits = facts.vocab_size * (dtype_bytes + 8)
    cache = 2 * facts.layers * 2 * heads * dtype_bytes
    return int(left / (stream + logits)), int(left / (stream + cache))


def batches(lengths: Sequence[int], rows_at_most: int, tokens_at_most: int) -> list[list[int]]:
    """Return the places of the rows of each pass, the longest rows first.

    Rows of like length meet, so that little is padded. The longest pass comes first, so that
    memory runs out at once or not at all.

    Args:
        lengths: tokens of each row.
        rows_at_most: in one pass.
        tokens_at_most: in one pass, padding counted; a row that is longer has a pass of its own.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    found: list[list[int]] = []
    for place in order:
        batch = found[-1] if found else []
        width = lengths[batch[0]] if batch else 0
        if batch and len(batch) < rows_at_most and width * (len(batch) + 1) <= tokens_at_most:
            batch.append(place)
        else:
            found.append([place])
    return found


def in_passes(
    device: torch.device, made: Sequence[list[int]], work: Callable[[list[int]], list[T]]
) -> Iterator[tuple[list[int], list[T]]]:
    """Yield each batch's places and results; a batch that does not fit is halved.

    Args:
        device: whose memory may run out.
        made: from `batches`.
        work: returns one result for each place.

    Raises:
        RuntimeError: memory runs out with a single row.
    """
    from mst.training.faults import free_memory, is_out_of_memory

    waiting = list(reversed(made))
    while waiting:
        places = waiting.pop()
        full = False
        try:
            results = work(places)
        except RuntimeError as error:
            if len(places) == 1 or not is_out_of_memory(error):
                raise
            full = True
        if full:
            free_memory(device)
            half = len(places) // 2
            waiting += [places[half:], places[:half]]
        else:
            yield places, results
