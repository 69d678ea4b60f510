"""What an adapter learns is not rounded away beside its frozen weight's product in bfloat16."""

from __future__ import annotations

from typing import Any

import torch

from mst.request import TrainRequest
from mst.training.adapters import lora_config, prepare_model
from mst.training.loss import compute_in


def test_a_small_update_moves_the_sum_as_far_as_in_float32() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    config = configs.for_model(
        "llama", vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = prepare_model(
        models.from_config(config, dtype=torch.bfloat16), lora_config(TrainRequest())
    )
    layer = next(each for name, each in model.named_modules() if name.endswith("up_proj"))
    untyped: Any = layer
    x = torch.randn(64, 32, 128)
    with torch.no_grad():
        untyped.base_layer.weight.normal_(std=0.1)
        # A hundredth of the distance between the sums' neighbours in bfloat16.
        untyped.lora_B["default"].weight.normal_(std=1e-4)
        update = untyped.lora_B["default"](untyped.lora_A["default"](x))
        update = update * untyped.scaling["default"]
        with compute_in(model, "cpu", torch.bfloat16):
            found = untyped(x).float()
        exact = x.bfloat16().float() @ untyped.base_layer.weight.float().t()
    assert found.shape == (64, 32, 256)
    # How much of the update is there, on average over half a million sums.
    rounded = exact.bfloat16().float()
    kept = float(((found - exact) * update).sum() / (update * update).sum())
    lost = float((((rounded + update).bfloat16() - exact) * update).sum() / (update * update).sum())
    assert abs(kept - 1) < 0.2
    assert abs(lost) < 0.5
