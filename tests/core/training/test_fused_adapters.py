"""What an adapter learns is not rounded away beside its frozen weight's product in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear

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
    layer: Any = next(each for name, each in model.named_modules() if name.endswith("up_proj"))
    x = torch.randn(64, 32, 128)
    with torch.no_grad():
        layer.base_layer.weight.normal_(std=0.1)
        layer.lora_B["default"].weight.normal_(std=1e-4)
        update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        exact = x.bfloat16().float() @ layer.base_layer.weight.float().t()
        with compute_in(model, "cpu", torch.bfloat16):
            found = layer(x).float()
            of_peft = Linear.forward(layer, x).float()
    assert found.shape == (64, 32, 256)
    # What most sums gain is far less than lies between them and the next number of bfloat16.
    assert float(update.abs().median()) < 0.1 * float(exact.abs().median()) * 2**-8

    assert abs(arrived(found, exact, update) - 1) < 0.2
    assert abs(arrived(of_peft, exact, update)) < 0.5


def arrived(found: torch.Tensor, exact: torch.Tensor, update: torch.Tensor) -> float:
    """Return how much of an update is in sums, on average over all."""
    return float(((found - exact) * update).sum() / (update * update).sum())
