"""Attention on a CPU as a few products of blocks of positions, for training.

torch's own kernel for CPUs (2.13.0) multiplies small tiles: in bfloat16 it reached 65 GFLOPS on a
core whose products reach 200 (AMD EPYC, Zen 4), and took a quarter of a step of SmolLM2-135M. Here
a block's queries meet, in one product for all heads that share a key, the positions between the
first and the last that any of them sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Queries of a block, and how many scores of several lines are computed at a time.
BLOCK = 64
SCORES = 2**19


@dataclass(frozen=True)
class _Block:
    """Queries of some lines, and the keys between the first and the last that they see.

    Attributes:
        lines: of the tensors.
        queries: positions.
        keys: positions.
        added: (lines or 1, 1, queries, keys) 0 where a key is seen, the lowest number elsewhere.
    """

    lines: slice
    queries: slice
    keys: slice
    added: Tensor


def _blocks(query: Tensor, mask: Tensor | None) -> Iterator[_Block]:
    lines, heads, length, _ = query.shape
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    together = max(1, SCORES // (heads * BLOCK * length))
    least = torch.finfo(query.dtype).min
    for line in range(0, lines, together):
        some = slice(line, min(line + together, lines))
        seen = mask[some, 0] if len(mask) > 1 else mask[:, 0]
        starts = range(0, length, BLOCK)
        anywhere = torch.stack([seen[:, start : start + BLOCK].any(1).any(0) for start in starts])
        firsts = anywhere.byte().argmax(1).tolist()
        after = anywhere.flip(1).byte().argmax(1).tolist()
        for start, first, unseen in zip(starts, firsts, after, strict=True):
            queries, keys = slice(start, min(start + BLOCK, length)), slice(first, length - unseen)
            added = torch.zeros((), dtype=query.dtype).where(seen[:, queries, keys], least)
            yield _Block(some, queries, keys, added[:, None])


def _by_key(tensor: Tensor, shared: int) -> Tensor:
    """Return queries by the key that they share: (lines * shared, group * length, width)."""
    lines, heads, length, width = tensor.shape
    return tensor.reshape(lines * shared, heads // shared * length, width)


def _by_head(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the queries of `_by_key` as (lines, length, heads, width), as `like` has them."""
    lines, length, heads, _ = like.shape
    return tensor.view(lines, heads, length, -1).transpose(1, 2)


def _weights(query: Tensor, key: Tensor, block: _Block) -> Tensor:
    """Return softmax(query @ key.T + added), (lines * shared, queries, keys)."""
    scores = torch.bmm(query, key.mT)
    lines, queries, keys = block.lines, *block.added.shape[2:]
    scores.view(lines.stop - lines.start, -1, queries, keys).add_(block.added)
    return torch.softmax(scores, -1)


@torch.library.custom_op("mst::block_attention", mutates_args=())
def block_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return softmax(scale * query @ key.T, where the mask allows it) @ value.

    Args:
        query: (lines, heads, length, width).
        key: (lines, heads that share, length, width); each is of as many heads of `query`.
        value: as `key`, whose width may be another.
        mask: (lines or 1, 1, length, length) bool, True where a query sees a key; None for all up
            to itself.
        scale: of the scores.

    Returns:
        (lines, length, heads, width of `value`), contiguous.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    lines, heads, length, _ = query.shape
    shared = key.shape[1]
    found = query.new_empty(lines, length, heads, value.shape[-1])
    query, key, value = query * scale, key.contiguous(), value.contiguous()
    for block in _blocks(query, mask):
        some, rows, columns = block.lines, block.queries, block.keys
        keys, values = (each[some, :, columns].flatten(0, 1) for each in (key, value))
        weights = _weights(_by_key(query[some, :, rows], shared), keys, block)
        place = found[some, rows]
        place.copy_(_by_head(torch.bmm(weights, values), place))
    return found


@block_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    lines, heads, length, _ = query.shape
    return query.new_empty(lines, length, heads, value.shape[-1])


@torch.library.custom_op("mst::block_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; nothing but these was kept."""
    lines, heads, length, width = query.shape
    shared = key.shape[1]
    of_query = query.new_empty(lines, length, heads, width)
    # In float32: several blocks add to one key.
    of_key, of_value = (each.new_zeros(each.shape, dtype=torch.float32) for each in (key, value))
    query, key, value = query * scale, key.contiguous(), value.contiguous()
    for block in _blocks(query, mask):
        some, rows, columns = block.lines, block.queries, block.keys
        keys, values = (each[some, :, columns].flatten(0, 1) for each in (key, value))
        own = _by_key(query[some, :, rows], shared)
        slopes = _by_key(gradient[some, rows].transpose(1, 2), shared)
        weights = _weights(own, keys, block)
        place = of_value[some, :, columns]
        place += torch.bmm(weights.mT, slopes).view_as(place)
        of_weights = torch.bmm(slopes, values.mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        place = of_key[some, :, columns]
        place += torch.bmm(of_scores.mT, own).view_as(place)
        place = of_query[some, rows]
        place.copy_(_by_head(torch.bmm(of_scores, keys), place))
    return (
        of_query.mul_(scale).transpose(1, 2),
        of_key.to(key.dtype),
        of_value.to(value.dtype),
    )


@_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lines, heads, length, width = query.shape
    of_query = query.new_empty(lines, length, heads, width).transpose(1, 2)
    return of_query, key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, mask = ctx.saved_tensors
    return (*_backward(gradient, query, key, value, mask, ctx.scale), None, None)


block_attention.register_autograd(_gradients, setup_context=_keep)


def _fits(
    query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, arguments: dict[str, Any]
) -> bool:
    """Return whether these are what `block_attention` computes, on a CPU.

    Without gradients too: rounding must not part a policy from its reference.
    """
    return (
        query.device.type == "cpu"
        and dropout == 0
        and query.shape[2] == key.shape[2]
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1))
        and all(arguments.get(name) is None for name in ("softcap", "position_bias", "cache"))
    )


def attention_forward(
    torchs_own: Callable[..., Any],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' `sdpa` does, in blocks where it can be.

    Args:
        torchs_own: transformers' function, which does all else.
        module: the attention layer.
        query, key, value, attention_mask, dropout, scaling, is_causal, arguments: as it takes them.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not _fits(query, key, attention_mask, dropout, arguments) or not (
        causal or attention_mask is not None
    ):
        found: tuple[Tensor, None] = torchs_own(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **arguments,
        )  # fmt: skip
        return found
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (each.to(dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return block_attention(query, key, value, attention_mask, scale), None


def use_block_attention() -> None:
    """Have transformers' models with `sdpa` attention compute it in blocks, in this process."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    functions["sdpa"] = functools.partial(attention_forward, sdpa_attention_forward)
