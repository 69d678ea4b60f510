"""Prompts that a model has read once, to go on from in several ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mst.training.batches import KEPT_MULTIPLE, rounded
from mst.training.loss import last_logits

if TYPE_CHECKING:
    import torch

# With fewer tokens in common, reading them apart takes longer than reading them in every row.
SHARED_AT_LEAST = 4


@dataclass(frozen=True)
class Prefix:
    """A batch of prompts, read once.

    Attributes:
        cache: transformers' keys and values of them.
        mask: 1 for each token that is no padding, (rows, width).
        logits: of the next token, (rows, vocabulary), float32.
    """

    cache: Any
    mask: torch.Tensor
    logits: torch.Tensor


def shared_length(rows: Sequence[Sequence[Any]]) -> int:
    """Return how many items all rows begin with, each row's last left out; 0 for a lone row."""
    if len(rows) < 2:
        return 0
    most = min(map(len, rows)) - 1
    unlike = (place for place in range(most) if len({row[place] for row in rows}) > 1)
    return next(unlike, most)


def read_shared(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> Prefix | None:
    """Read what all prompts begin with, once; None where that is little, or can't be repeated."""
    length = shared_length(prompts)
    if length < SHARED_AT_LEAST:
        return None
    start = read(model, [prompts[0][:length]], 0, width=length)
    return start if parts_by_row(start.cache) else None


def read(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    pad: int,
    start: Prefix | None = None,
    width: int | None = None,
) -> Prefix:
    """Read prompts in one pass, so that each ends where its answer begins.

    Args:
        model: a causal language model of transformers, on its device.
        prompts: token ids, those of `start` first.
        pad: id that fills the space before a shorter prompt.
        start: from `read_shared`, for these and other prompts; left as it is.
        width: tokens of a row, padding counted; by default a multiple of `KEPT_MULTIPLE`.
    """
    import torch

    device = next(model.parameters()).device
    rests = [list(each[start.mask.shape[1] if start else 0 :]) for each in prompts]
    # A CPU's kernel library keeps some 5 MiB for every shape that it has met.
    width = width or rounded(max(map(len, rests)), KEPT_MULTIPLE)
    ids = torch.tensor([[pad] * (width - len(each)) + each for each in rests])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in rests]).to(device)
    before: dict[str, Any] = {}
    whole = mask
    if start is not None:
        cache = copy.deepcopy(start.cache)
        cache.batch_repeat_interleave(len(prompts))
        before = {"past_key_values": cache}
        whole = torch.cat([start.mask.expand(len(prompts), -1), mask], dim=1)
    out = model(
        input_ids=ids.to(device),
        attention_mask=whole,
        position_ids=(whole.cumsum(1) - 1).clamp(min=0)[:, -width:],
        use_cache=True,
        **before,
        **last_logits(model, device),
    )
    return Prefix(out.past_key_values, whole, out.logits[:, -1].float())


def continued(
    model: torch.nn.Module, prefix: Prefix, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Feed tokens (rows, n) after the prefix, whose cache grows; return their logits."""
    import torch

    whole = torch.cat([prefix.mask, mask], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    out = model(
        input_ids=tokens,
        attention_mask=whole,
        position_ids=positions,
        past_key_values=prefix.cache,
        use_cache=True,
    )
    logits: torch.Tensor = out.logits.float()
    return logits


def generated(
    model: torch.nn.Module, prefix: Prefix, stop: Sequence[int], at_most: int
) -> list[list[int]]:
    """Return the greedy answer after each prompt, without its end of turn; the cache grows."""
    import torch

    token = prefix.logits.argmax(-1)
    answers: list[list[int]] = [[] for _ in token]
    open_rows = set(range(len(answers)))
    for _ in range(at_most):
        for row in list(open_rows):
            if int(token[row]) in stop:
                open_rows.discard(row)
            else:
                answers[row].append(int(token[row]))
        if not open_rows:
            break
        ones = torch.ones_like(token)[:, None]
        logits = continued(model, prefix, token[:, None], ones)
        prefix = Prefix(prefix.cache, torch.cat([prefix.mask, ones], dim=1), logits)
        token = logits[:, -1].argmax(-1)
    return answers


def parts_by_row(cache: Any) -> bool:
    """Whether rows can be taken out of a cache; those of recurrent layers have no way to."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(each) in known for each in getattr(cache, "layers", [None]))


def rows_of(prefix: Prefix, rows: Sequence[int]) -> Prefix:
    """Return some rows of a prefix, copied."""
    import torch

    places = torch.tensor(rows, device=prefix.logits.device)
    cache = copy.deepcopy(prefix.cache)
    cache.batch_select_indices(places)
    return Prefix(cache, prefix.mask[places], prefix.logits[places])
