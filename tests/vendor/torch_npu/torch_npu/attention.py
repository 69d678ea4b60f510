# ruff: noqa: TID253 -- part of torch_npu, which is imported where torch is meant.
"""What torch_npu.npu_fusion_attention computes, in plain torch.

Source: Ascend Extension for PyTorch, API reference, torch_npu.npu_fusion_attention: signature,
layouts, and sparse_mode 0 (a whole mask), 2 (causal from the top left corner) and 3 (causal from
the bottom right one), both with the compressed mask of 2048 x 2048.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

COMPRESSED_MASK = (2048, 2048)
UNLIMITED = 2147483647


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
) -> tuple[torch.Tensor, Any, Any, Any, int, int, int]:
    """Return the attention's output in the layout of `query`, and six values that nobody reads.

    Where `atten_mask` is true, a key is hidden. Keys and values may have fewer heads.

    Raises:
        NotImplementedError: an option that the stand-in doesn't have.
        RuntimeError: what the real kernel refuses too.
    """
    given = {"pse": pse, "padding_mask": padding_mask, "prefix": prefix}
    for name, one in given.items():
        if one is not None:
            raise NotImplementedError(f"the stand-in of npu_fusion_attention has no {name}")
    _check(query, key, head_num, input_layout, atten_mask, sparse_mode)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hidden = _hidden(q, k, atten_mask, sparse_mode, pre_tockens, next_tockens)
        return _attention(q, k, v, hidden, scale, keep_prob)

    if input_layout == "TND":
        output = _packed(attend, query, key, value, actual_seq_qlen, actual_seq_kvlen)
    else:
        width = query.shape[-1] // head_num if input_layout in {"BSH", "SBH"} else query.shape[-1]
        heads = [_to_bnsd(one, input_layout, width) for one in (query, key, value)]
        output = _from_bnsd(attend(*heads), input_layout)
    return output, None, None, None, 0, 0, 0


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    head_num: int,
    layout: str,
    mask: torch.Tensor | None,
    sparse_mode: int,
) -> None:
    heads = {"BNSD": 1, "BSND": 2, "TND": 1}
    if layout not in {*heads, "BSH", "SBH"}:
        raise RuntimeError(f"npu_fusion_attention: input_layout {layout!r} is not supported")
    if layout in heads and query.shape[heads[layout]] != head_num:
        raise RuntimeError(
            f"npu_fusion_attention: head_num {head_num} is not that of {tuple(query.shape)}"
        )
    if query.dtype != key.dtype:
        raise RuntimeError(f"npu_fusion_attention: query is {query.dtype}, key {key.dtype}")
    if mask is not None and mask.dtype not in {torch.bool, torch.uint8}:
        raise RuntimeError(f"npu_fusion_attention: atten_mask is {mask.dtype}, not bool or uint8")
    if sparse_mode not in {0, 2, 3}:
        raise NotImplementedError(f"the stand-in has no sparse_mode {sparse_mode}")
    if sparse_mode and (mask is None or tuple(mask.shape) != COMPRESSED_MASK):
        shape = None if mask is None else tuple(mask.shape)
        raise RuntimeError(
            f"npu_fusion_attention: sparse_mode {sparse_mode} takes an atten_mask of"
            f" {COMPRESSED_MASK}, not {shape}"
        )


def _hidden(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    sparse_mode: int,
    before: int,
    after: int,
) -> torch.Tensor | None:
    """Return which keys each query can't see, broadcast to (batch, heads, queries, keys)."""
    queries, keys = q.shape[2], k.shape[2]
    if sparse_mode:
        shift = keys - queries if sparse_mode == 3 else 0
        # Position by position rather than from the mask, which says no more than "causal".
        return _distance(q, queries, keys) > shift
    if mask is None:
        return None
    hidden = mask.bool()
    if before < UNLIMITED or after < UNLIMITED:
        distance = _distance(q, queries, keys)
        hidden = hidden | (distance > after) | (distance < -before)
    return hidden


def _distance(like: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    row = torch.arange(queries, device=like.device).unsqueeze(1)
    return torch.arange(keys, device=like.device).unsqueeze(0) - row


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
    keep_prob: float,
) -> torch.Tensor:
    """Return softmax(q k' scale) v in the layout BNSD; a query that sees nothing gets zeros."""
    groups = q.shape[1] // k.shape[1]
    k, v = (one.repeat_interleave(groups, dim=1) for one in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
        scores = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    weights = scores.softmax(-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0.0)
    weights = torch.nn.functional.dropout(weights, 1 - keep_prob, training=keep_prob < 1)
    return weights.to(v.dtype) @ v


def _packed(
    attend: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: Sequence[int] | None,
    key_ends: Sequence[int] | None,
) -> torch.Tensor:
    """Return the attention within each sequence of a row of them, told apart by their ends."""
    if query_ends is None or key_ends is None:
        raise RuntimeError("npu_fusion_attention: TND takes actual_seq_qlen and actual_seq_kvlen")
    parts = []
    for (q0, q1), (k0, k1) in zip(
        pairwise([0, *query_ends]), pairwise([0, *key_ends]), strict=True
    ):
        one = [
            tensor[begin:end].transpose(0, 1).unsqueeze(0)
            for tensor, begin, end in ((query, q0, q1), (key, k0, k1), (value, k0, k1))
        ]
        parts.append(attend(*one).squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _to_bnsd(tensor: torch.Tensor, layout: str, width: int) -> torch.Tensor:
    if layout == "BNSD":
        return tensor
    if layout == "SBH":
        tensor = tensor.transpose(0, 1)
    if layout in {"BSH", "SBH"}:
        tensor = tensor.unflatten(-1, (-1, width))
    return tensor.transpose(1, 2)


def _from_bnsd(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "BNSD":
        return tensor
    tensor = tensor.transpose(1, 2)
    if layout in {"BSH", "SBH"}:
        tensor = tensor.flatten(-2)
    return tensor.transpose(0, 1) if layout == "SBH" else tensor
