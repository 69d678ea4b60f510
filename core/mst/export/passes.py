"""Rows as a model takes them together: what all of them begin with is computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mst.data.encode import IGNORE, Example
from mst.evaluate.reading import SHARED_AT_LEAST, parts_by_row, shared_length
from mst.export.meanwhile import GoOn

if TYPE_CHECKING:
    import torch

# Both models' logits of so many tokens are held at once: 512 of SmolLM2's are 100 MB in float32.
TOKENS_AT_ONCE = 512
# Of the largest value: how far a row may come out otherwise when its beginning was read apart.
_AS_ALONE = 1e-3
_CACHE = "past_key_values"


@dataclass(frozen=True)
class Pass:
    """Tokens that are read together, each followed by another; tensors are (rows, width).

    Attributes:
        ids: of the tokens.
        mask: 1 where there is one, 0 where a shorter row is filled up.
        following: the token that comes after.
        learnt: whether the model is trained to predict that.
        times: rows that each row stands for.
        begins: whether the passes after this one go on from it.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    following: torch.Tensor
    learnt: torch.Tensor
    times: int = 1
    begins: bool = False


def passes_of(rows: Sequence[Example], model: Any = None) -> tuple[Pass, ...]:
    """Return the passes over rows, those of like length together; a row of one token says nothing.

    Args:
        rows: encoded.
        model: that will read them: what all rows begin with becomes a pass of its own, where they
            come out of it as they do alone. None for a model that is asked for no such thing.
    """
    chosen = [each for each in rows if len(each.input_ids) > 1]
    shared = 0 if model is None else _shared(chosen)
    if shared < SHARED_AT_LEAST:
        return tuple(_passes(chosen, 0))
    begin = replace(_pass(chosen[:1], 0, shared), times=len(chosen), begins=True)
    if not _as_alone(model, begin, chosen):
        return tuple(_passes(chosen, 0))
    return begin, *_passes(chosen, shared)


def outputs(model: Any, passes: Sequence[Pass], go_on: GoOn) -> Iterator[Any]:
    """Yield what a model of transformers, or its decoder, answers to each pass.

    Args:
        model: in evaluation mode.
        passes: from `passes_of`, for a model of this shape.
        go_on: called before each pass.
    """
    import torch

    start: Any = None
    for each in passes:
        go_on()
        with torch.inference_mode():
            if each.begins:
                found = _read_beginning(model, each)
                start = getattr(found, _CACHE)
            elif start is None:
                found = model(input_ids=each.ids, attention_mask=each.mask, use_cache=False)
            else:
                found = _read_after(model, start, each)
        yield found


def _read_beginning(model: Any, begin: Pass) -> Any:
    return model(input_ids=begin.ids, use_cache=True)


def _read_after(model: Any, start: Any, rest: Pass) -> Any:
    """Return what a model answers to rows after what they begin with, whose cache stays."""
    import torch

    cache = copy.deepcopy(start)
    cache.batch_repeat_interleave(len(rest.ids))
    before = rest.mask.new_ones(len(rest.ids), start.get_seq_length())
    mask = torch.cat([before, rest.mask], dim=1)
    return model(input_ids=rest.ids, attention_mask=mask, past_key_values=cache, use_cache=True)


def _shared(rows: Sequence[Example]) -> int:
    """Return how many tokens all rows begin with that are followed by the same and learnt alike."""
    kinds = [
        [(token, label == IGNORE) for token, label in zip(row.input_ids, row.labels, strict=True)]
        for row in rows
    ]
    return shared_length(kinds) - 1


def _as_alone(model: Any, begin: Pass, rows: Sequence[Example]) -> bool:
    """Return whether a row comes out the same whether its beginning is read apart or not.

    It does with causal attention and a cache of keys and values; it does not with a cache that is
    cut, or where the beginning sees what follows.
    """
    import torch

    length = begin.ids.shape[1]
    row = max(rows, key=lambda each: len(each.input_ids))
    with torch.inference_mode():
        start = getattr(_read_beginning(model, begin), _CACHE, None)
        if not parts_by_row(start):
            return False
        apart = _read_after(model, start, _pass([row], length))
    (alone,) = outputs(model, [_pass([row], 0)], lambda: None)
    own = alone[0][:, length:]
    return bool((apart[0] - own).abs().max() <= _AS_ALONE * own.abs().max())


def _passes(rows: Sequence[Example], start: int) -> Iterator[Pass]:
    left = sorted(rows, key=lambda each: len(each.input_ids))
    while left:
        width = len(left[-1].input_ids) - 1 - start
        count = max(1, TOKENS_AT_ONCE // width)
        part, left = left[-count:], left[:-count]
        yield _pass(part, start)


def _pass(rows: Sequence[Example], start: int, end: int | None = None) -> Pass:
    """Return the tokens of rows from `start` on, up to `end` or a row's last but one."""
    import torch

    ends = [min(len(each.input_ids) - 1, end or len(each.input_ids)) for each in rows]
    width = max(ends) - start

    def filled(values: Callable[[Example], Sequence[int]], shift: int, fill: int) -> torch.Tensor:
        cut = [
            values(row)[start + shift : end + shift] for row, end in zip(rows, ends, strict=True)
        ]
        return torch.tensor([[*each, *[fill] * (width - len(each))] for each in cut])

    return Pass(
        ids=filled(lambda row: row.input_ids, 0, 0),
        mask=filled(lambda row: [1] * len(row.input_ids), 0, 0),
        following=filled(lambda row: row.input_ids, 1, 0),
        learnt=filled(lambda row: row.labels, 1, IGNORE) != IGNORE,
    )
