"""An output head that is computed in pieces says what the whole one says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mst.serve.head_pieces import compute_in_pieces


def model(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    made: Any = LlamaForCausalLM(config)
    return made.to(torch.bfloat16).eval()


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_pieces_make_the_same_product(rows: int) -> None:
    large = model(70_001)
    states = torch.randn(rows, 1, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        whole = torch.nn.functional.linear(states, large.lm_head.weight)
        compute_in_pieces(large, torch.device("cpu"))
        pieces = large.lm_head(states)

    assert "forward" in vars(large.lm_head)
    assert pieces.shape == whole.shape
    # One rounding of bfloat16 apart at most: kernels add in another order.
    torch.testing.assert_close(pieces, whole, rtol=2**-7, atol=2**-7)


def test_a_small_head_is_left_as_it_is() -> None:
    small = model(100)
    compute_in_pieces(small, torch.device("cpu"))

    assert "forward" not in vars(small.lm_head)
