"""Keys and values of many sequences in one block that every layer's attention reads as it is.

Only functions that run models import this module: it needs torch and transformers.

All rows end at the same column, and shorter ones begin later:

    row 0   . . a b c d e f |
    row 1   . . . . p q r s |      `|` is where every row's next token goes
    row 2   x y z u v w t o |

So a step writes one column for all rows, with one copy; and a mask of two dimensions, rows by
columns, says what is empty: from that transformers itself makes each architecture's masks, sliding
windows and ALiBi included, because columns are as far apart as tokens are. Rows that were
left-padded in `transformers.generate` look the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from mst.serve.pages import Block

# Keys and values of one sequence: of each layer that keeps any, by its place, two tensors
# (heads, tokens, head size).
Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]

# So many columns of a small head make whole pages.
_COLUMNS = 64


class OtherCache(Exception):
    """A model's layers keep something else than keys and values; says what."""


class Frame:
    """Where the rows lie in the block; shared by all layers."""

    def __init__(self) -> None:
        """There are no rows yet."""
        self.lengths: list[int] = []
        self.end = 0
        self.row_capacity = self.column_capacity = 0

    @property
    def width(self) -> int:
        """Return the length of the longest row: so many columns are read."""
        return max(self.lengths, default=0)


# transformers' classes for caches have methods without types.
class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values (rows, heads, columns, head size)."""

    # Windows are kept whole, so that a row's beginning can be kept for a later prompt.
    is_sliding = False

    def __init__(self, frame: Frame) -> None:
        """Lie in a frame; the tensors are made when the first keys come."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.frame = frame
        self.blocks: tuple[Block, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room of the kind that a layer's keys and values need."""
        frame = self.frame

        def room(like: torch.Tensor) -> Block:
            shape = (frame.row_capacity, like.shape[1], frame.column_capacity, like.shape[3])
            return Block(like, shape)

        self.blocks = (room(key_states), room(value_states))
        self.keys, self.values = (each.tensor for each in self.blocks)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new columns of all rows after the end, and return all that is read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.tensors()
        frame = self.frame
        rows, begin = len(frame.lengths), frame.end - frame.width
        stop = frame.end + key_states.shape[-2]
        keys[:rows, :, frame.end : stop] = key_states
        values[:rows, :, frame.end : stop] = value_states
        return keys[:rows, :, begin:stop], values[:rows, :, begin:stop]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole block's keys and values."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a pass reads, and that it reads them from the first."""
        return self.frame.width + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many columns lie before a pass's own."""
        return self.frame.width

    def get_max_length(self) -> int:
        """Return -1: the block grows."""
        return -1

    # Its name in transformers 5.5.
    get_max_cache_shape = get_max_length


class Slots(Cache):
    """The block of all layers, as transformers' models take a cache."""

    def __init__(self, model: Any) -> None:
        """Make an empty block for a model.

        Raises:
            OtherCache: its layers keep something else than keys and values.
        """
        self.frame = Frame()
        layers: list[Any] = [self._layer(each) for each in DynamicCache(config=model.config).layers]
        if not layers:
            raise OtherCache("transformers does not say what its layers keep")
        super().__init__(layers=layers)
        self._held = {
            place: each for place, each in enumerate(layers) if isinstance(each, SlotLayer)
        }

    def _layer(self, usual: Any) -> Any:
        """Return a layer that keeps what transformers' own does."""
        kind = type(usual)
        if kind in (DynamicLayer, DynamicSlidingWindowLayer):
            return SlotLayer(self.frame)
        # Of layers without attention, or that read what another layer has written.
        if kind.__name__ == "DummyLayer":
            return usual
        raise OtherCache(f"its layers keep what transformers calls {kind.__name__}")

    @property
    def lengths(self) -> Sequence[int]:
        """Return each row's tokens."""
        return self.frame.lengths

    def bytes(self) -> int:
        """Return what the block takes once it is full."""
        return sum(part.nbytes for _, each in self._made() for part in each.tensors())

    def held_bytes(self) -> int:
        """Return what the rows' tokens take."""
        tokens, frame = sum(self.frame.lengths), self.frame
        columns = frame.row_capacity * frame.column_capacity
        return self.bytes() * tokens // columns if columns else 0

    def _made(self) -> list[tuple[int, SlotLayer]]:
        """Return the layers that hold anything: some read what another has written."""
        return [pair for pair in self._held.items() if pair[1].is_initialized]

    def mask(self, columns: int, computed: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return which columns of a pass hold tokens, 1 or 0 (rows, width + columns).

        Args:
            columns: that the pass adds.
            computed: of these, how many are each row's tokens; the last ones.
            device: of the mask.
        """
        width = self.frame.width
        place = torch.arange(width + columns, device=device)
        first = [
            width - length if length else width + columns - own
            for length, own in zip(self.frame.lengths, computed, strict=True)
        ]
        return (place >= torch.tensor(first, device=device)[:, None]).long()

    def reserve(self, columns: int) -> None:
        """Make room for a pass that adds columns to all rows."""
        frame = self.frame
        if len(frame.lengths) > frame.row_capacity or frame.end + columns > frame.column_capacity:
            self._arrange(len(frame.lengths), frame.width + columns, frame.width)

    def commit(self, computed: Sequence[int]) -> None:
        """Count a pass's columns as written: so many of each row's own."""
        columns = max(computed)
        self.frame.lengths = [
            length + own for length, own in zip(self.frame.lengths, computed, strict=True)
        ]
        self.frame.end += columns

    def columns(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each layer's keys and values of all rows (rows, heads, columns, head size).

        What a pass without transformers' own forward pass reads and writes, after `reserve`; the
        columns before `Frame.end`, as many as `Frame.width`, hold the rows.
        """
        rows = len(self.frame.lengths)
        blocks = [each.tensors() for each in self._held.values()]
        if rows == self.frame.row_capacity:
            return blocks
        return [(keys.narrow(0, 0, rows), values.narrow(0, 0, rows)) for keys, values in blocks]

    def add_empty(self, rows: int) -> None:
        """Add rows without tokens; only a block that holds none has any use for them."""
        self.frame.lengths += [0] * rows

    def add(self, kept: Kept | None, length: int) -> None:
        """Add a row.

        Args:
            kept: of the sequence, of which the first `length` tokens are taken; None for none.
            length: the row's tokens.
        """
        frame = self.frame
        row, width = len(frame.lengths), max(frame.width, length)
        if row >= frame.row_capacity or frame.end < width or frame.end >= frame.column_capacity:
            self._arrange(row + 1, width + 1, width)
        frame.lengths.append(length)
        begin = frame.end - length
        if kept is None:
            return
        for place, pair in kept.items():
            layer = self._held[place]
            if not layer.is_initialized:
                layer.lazy_initialization(pair[0][None], pair[1][None])
            for block, own in zip(layer.tensors(), pair, strict=True):
                block[row, :, begin : frame.end] = own[:, :length]

    def kept(self, row: int) -> Kept:
        """Return a row's keys and values; they lie in the block itself."""
        begin = self.frame.end - self.frame.lengths[row]
        end = self.frame.end
        blocks = {place: each.tensors() for place, each in self._made()}
        return {
            place: (keys[row, :, begin:end], values[row, :, begin:end])
            for place, (keys, values) in blocks.items()
        }

    def remove(self, row: int) -> int:
        """Take a row out; the last one takes its place. Return where that one was.

        What no row has is zeros again: a longer row moves the window there.
        """
        frame = self.frame
        last = len(frame.lengths) - 1
        old, begin = (frame.end - frame.lengths[each] for each in (row, last))
        for _, layer in self._made():
            for block in layer.blocks:
                if row != last:
                    block.tensor[row, :, old:begin] = 0
                    block.tensor[row, :, begin : frame.end] = block.tensor[
                        last, :, begin : frame.end
                    ]
                block.clear(last)
        frame.lengths[row] = frame.lengths[last]
        frame.lengths.pop()
        return last

    def _arrange(self, rows: int, columns: int, end: int) -> None:
        """Move everything to a block of a size that fits, its rows ending at a column.

        There is an eighth to spare, so that what is copied stays a small share of what is read, and
        a block that has become too large shrinks: columns that no row has any more take memory.
        """
        frame = self.frame
        old_end, held = frame.end, frame.lengths[: frame.row_capacity]
        frame.row_capacity = _power_of_two(rows)
        spared = columns + columns // 8
        frame.column_capacity = -(-spared // _COLUMNS) * _COLUMNS
        for _, layer in self._made():
            before = layer.tensors()
            layer.lazy_initialization(*before)
            for old, new in zip(before, layer.tensors(), strict=True):
                for row, length in enumerate(held):
                    own = old[row, :, old_end - length : old_end]
                    new[row, :, end - length : end] = own
        frame.end = end


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
