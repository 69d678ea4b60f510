"""Steps of one answer on a CPU: without oneDNN, which is as it was afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mst.chat import Sampling
from mst.generate import generate
from mst.one_row import one_row, reads_half


def enabled() -> bool:
    import torch

    return bool(torch._C._get_mkldnn_enabled())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_steps_of_16_bit_weights_go_without_onednn_and_prompts_with(
    tiny_model: Path, dtype: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    model.eval()
    passes: list[tuple[int, bool]] = []
    model.register_forward_pre_hook(
        lambda _, __, given: passes.append((given["input_ids"].numel(), enabled())),
        with_kwargs=True,
    )
    answer = list(generate(model, [1, 320, 275, 201], (), Sampling(max_new_tokens=4)))
    half = dtype == "bfloat16"

    assert reads_half(model, torch.device("cpu")) == half
    assert not reads_half(model, torch.device("meta"))
    assert passes == [(4, True), *[(1, not half)] * 3]
    assert len(answer) == 4
    assert enabled()


def test_onednn_is_on_again_after_an_error() -> None:
    found = []

    def fail() -> None:
        with one_row(True):
            found.append(enabled())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert found == [False]
    assert enabled()
    with one_row(False):
        assert enabled()
