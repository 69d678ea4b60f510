"""Attention on a CPU as a few products of blocks of positions, for training.

torch's own kernel for CPUs (2.13.0) multiplies small tiles: in bfloat16 it reached 65 GFLOPS on a
core whose products reach 200 (AMD EPYC, Zen 4), and took a quarter of a step of SmolLM2-135M. Here
a block's queries meet the keys that any of them sees, and no others: their own rows, and what these
share with other rows at their beginning. Those of many blocks meet in one product, for a step of
short rows is otherwise spent on starting small ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mst.training.attention_blocks import blocks_of
from mst.training.batches import rounded

# How many scores are computed at a time, of blocks whose numbers of keys are filled up to a
# multiple, and by so much to the most that one of them has, with keys that none of it sees.
SCORES = 2**20
KEYS_MULTIPLE = 32
FILLED = 1.25
# Of all lines' squares: so much is laid out once for all layers.
KEPT_SQUARES = 2**22


@dataclass(frozen=True)
class _Blocks:
    """Some blocks, of all heads that share a key, and the keys that they see.

    Attributes:
        some: of all blocks, which lie block by block, and line by line within that.
        keys: (blocks * shared * keys,) places in all keys, (lines * length * shared, width).
        added: (blocks, 1, queries, 1, keys) 0 where a key is seen, the lowest number elsewhere.
        slots: (blocks * shared * keys,) places in `keys`, by the key that lies there.
        bags: where each key's begin in `slots`, up to the last key that is there.
    """

    some: slice
    keys: Tensor
    added: Tensor
    slots: Tensor
    bags: Tensor

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Return keys or values of each block: (blocks * shared, keys, width)."""
        picked = tensor.transpose(1, 2).flatten(0, 2).index_select(0, self.keys)
        return picked.view(-1, self.added.shape[-1], tensor.shape[-1])

    def add_to(self, sums: Tensor, values: Tensor) -> None:
        """Add what `of_keys` has the shape of to (lines, length, shared, width), key by key."""
        values = values.flatten(0, 1)
        found = functional.embedding_bag(self.slots, values, self.bags, mode="sum")
        sums.view(-1, sums.shape[-1])[: len(found)] += found


class _Sight:
    """Which places see which, known by the mask's memory, which it keeps from being used anew."""

    def __init__(self, query: Tensor, shared: int, mask: Tensor | None) -> None:
        self.mask, self.dtype = mask, query.dtype
        self.lines, self.heads, self.length = query.shape[:3]
        self.shared = shared
        self.known: tuple[Any, ...] = (self.lines, self.heads, self.length, shared, query.dtype)
        if mask is not None:
            self.known += (mask.data_ptr(), mask._version, mask.shape, mask.stride())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sight) and self.known == other.known

    def __hash__(self) -> int:
        return hash(self.known)


def _blocks(query: Tensor, shared: int, mask: Tensor | None) -> Iterator[_Blocks]:
    """Return all blocks, those of the last masks without a look at them."""
    lines, _, length, _ = query.shape
    if mask is not None and mask.is_inference():  # it may change unseen
        mask = mask.clone()
    sight = _Sight(query, shared, mask)
    return iter(_kept(sight)) if lines * length**2 <= KEPT_SQUARES else _laid_out(sight)


# Some models have layers of two kinds, each with a mask of its own.
@functools.lru_cache(maxsize=2)
def _kept(sight: _Sight) -> tuple[_Blocks, ...]:
    return tuple(_laid_out(sight))


def _laid_out(sight: _Sight) -> Iterator[_Blocks]:
    lines, shared, length = sight.lines, sight.shared, sight.length
    mask = sight.mask
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    size, count = blocks_of(length)
    seen = functional.pad(mask[:, 0], (0, 0, 0, count * size - length)).expand(lines, -1, -1)
    seen = seen.view(lines, count, size, length).transpose(0, 1)
    anywhere = seen.any(2).flatten(0, 1)
    starts = torch.arange(lines).view(-1, 1, 1) * length * shared + torch.arange(shared)[:, None]
    least = torch.finfo(sight.dtype).min
    for some, keys in _groups(anywhere.sum(1).tolist(), size * sight.heads, length):
        # Those that are seen come first.
        places = anywhere[some].byte().argsort(dim=1, descending=True, stable=True)[:, :keys]
        blocks = range(count * lines)[some]
        rows = torch.stack([seen[each // lines, each % lines] for each in blocks])
        visible = rows.gather(2, places[:, None].expand(-1, size, -1))
        added = torch.zeros((), dtype=sight.dtype).where(visible, least)
        found = starts[[each % lines for each in blocks]] + places[:, None] * shared
        flat = found.flatten()
        counts = flat.bincount()
        yield _Blocks(
            some,
            flat,
            added[:, None, :, None],
            flat.argsort(stable=True),
            counts.cumsum(0) - counts,
        )


def _groups(counts: list[int], queries: int, length: int) -> Iterator[tuple[slice, int]]:
    """Yield blocks that are computed together, and how many keys each of them has.

    Args:
        counts: keys that each block sees.
        queries: of a block, in all heads.
        length: of a line.
    """
    start, own, most = 0, 0, 0
    for place, count in enumerate(counts):
        keys = min(rounded(max(count, 1), KEYS_MULTIPLE), length)
        blocks, more = place + 1 - start, max(most, keys)
        if blocks > 1 and (
            blocks * queries * more > SCORES or blocks * more > FILLED * (own + keys)
        ):
            yield slice(start, place), most
            start, own, more = place, 0, keys
        own, most = own + keys, more
    yield slice(start, len(counts)), most


def _by_block(tensor: Tensor, shared: int) -> Tensor:
    """Return (lines, heads, length, width) as (blocks * lines, shared, queries * group, width).

    The last block is filled up with zeros. A group is the heads that share a key. Contiguous.
    """
    lines, heads, length, width = tensor.shape
    size, count = blocks_of(length)
    if extra := size * count - length:
        tensor = functional.pad(tensor, (0, 0, 0, extra))
    cut = tensor.reshape(lines, shared, -1, count, size, width)
    rows = size * heads // shared
    return cut.permute(3, 0, 1, 4, 2, 5).reshape(-1, shared, rows, width).contiguous()


def _by_line(blocks: Tensor, lines: int, length: int) -> Tensor:
    """Return what `_by_block` has cut as (lines, length, heads, width), contiguous."""
    _, shared, rows, width = blocks.shape
    size, count = blocks_of(length)
    cut = blocks.view(count, lines, shared, size, rows // size, width)
    whole = cut.permute(1, 0, 3, 2, 4, 5).reshape(lines, count * size, -1, width)
    return whole[:, :length].contiguous()


def _weights(query: Tensor, key: Tensor, some: _Blocks) -> Tensor:
    """Return softmax(query @ key.T + added), (blocks * shared, queries, keys)."""
    scores = torch.bmm(query, key.mT)
    blocks, _, queries, _, keys = some.added.shape
    scores.view(blocks, -1, queries, query.shape[1] // queries, keys).add_(some.added)
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
    lines, _, length, _ = query.shape
    shared = key.shape[1]
    cut = _by_block(query * scale, shared)
    found = cut.new_empty(*cut.shape[:3], value.shape[-1])
    for each in _blocks(query, shared, mask):
        weights = _weights(cut[each.some].flatten(0, 1), each.of_keys(key), each)
        torch.bmm(weights, each.of_keys(value), out=found[each.some].flatten(0, 1))
    return _by_line(found, lines, length)


@block_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    lines, heads, length, _ = query.shape
    return query.new_empty(lines, length, heads, value.shape[-1])


@torch.library.custom_op("mst::block_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; nothing but these was kept."""
    lines, _, length, _ = query.shape
    shared = key.shape[1]
    cut, slopes_cut = _by_block(query * scale, shared), _by_block(gradient.transpose(1, 2), shared)
    of_query = torch.empty_like(cut)
    # In float32: several blocks add to one key.
    of_key, of_value = (
        torch.zeros_like(
            each.transpose(1, 2), dtype=torch.float32, memory_format=torch.contiguous_format
        )
        for each in (key, value)
    )
    for each in _blocks(query, shared, mask):
        keys, values = each.of_keys(key), each.of_keys(value)
        own, slopes = (whole[each.some].flatten(0, 1) for whole in (cut, slopes_cut))
        weights = _weights(own, keys, each)
        each.add_to(of_value, torch.bmm(weights.mT, slopes))
        of_weights = torch.bmm(slopes, values.mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        each.add_to(of_key, torch.bmm(of_scores.mT, own))
        torch.bmm(of_scores, keys, out=of_query[each.some].flatten(0, 1))
    return (
        _by_line(of_query, lines, length).mul_(scale).transpose(1, 2),
        # As they lay before: layers that torch compiled then are kept, and would not take others.
        of_key.to(key.dtype).transpose(1, 2).contiguous(),
        of_value.to(value.dtype).transpose(1, 2).contiguous(),
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
