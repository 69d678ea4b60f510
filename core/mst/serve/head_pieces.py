"""The output head's product a piece at a time, where oneDNN would lay all of it out anew.

For each product of several rows oneDNN copies a weight of 16 bits into a layout of its own. For an
output head, by far the largest weight of a small model, that is 54 MiB of SmolLM2-135M's process at
every step, all of them taken from the system and given back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mst.one_row import one_row, reads_half
from mst.training.adapters import under_adapters

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 4 << 20


def compute_in_pieces(model: Any, device: torch.device) -> None:
    """Let a model compute its output head in pieces, if that is a plain large layer on a CPU.

    Args:
        model: of transformers, with or without PEFT's layers around it.
        device: where it is.
    """
    import torch

    head: Any = under_adapters(model).get_output_embeddings()
    plain = type(head) is torch.nn.Linear and reads_half(head, device)
    if plain and head.weight.nbytes > 2 * _PIECE_BYTES:
        untyped: Any = head
        untyped.forward = _Pieces(head)


class _Pieces:
    """A linear layer's forward pass."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self._head = head
        self._rows = _PIECE_BYTES // (head.in_features * head.weight.element_size())

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import linear

        weight, bias, size = self._head.weight, self._head.bias, self._rows
        if states.dtype != weight.dtype:  # autocast's affair
            whole: torch.Tensor = linear(states, weight, bias)
            return whole
        if states.numel() == states.shape[-1]:
            with one_row(wanted=True):
                whole = linear(states, weight, bias)
                return whole
        found = states.new_empty(*states.shape[:-1], len(weight))
        for at in range(0, len(weight), size):
            piece = slice(at, at + size)
            found[..., piece] = linear(states, weight[piece], None if bias is None else bias[piece])
        return found
