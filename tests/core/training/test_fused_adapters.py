"""What an adapter learns is not rounded away beside its frozen weight's product in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mst.request import TrainRequest
from mst.training.adapters import load_model, lora_config, prepare_model
from mst.training.loss import compute_in
from mst.training.quantization import dequantized_weight
from mst.training.quantized_products import add_int8_product, add_nf4_product, adding_product

KINDS = ("none", "nf4", "int8")


def layer_of(directory: Path, quantization: str, dtype: str) -> Any:
    """Return a model with adapters that have learnt a little, and one of its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    config = configs.for_model(
        "llama", vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.1, mlp_bias=True,
    )  # fmt: skip
    models.from_config(config, dtype=torch.float32).save_pretrained(directory)
    loaded = load_model(directory, dtype, "sdpa", torch.device("cpu"), quantization)
    model = prepare_model(loaded, lora_config(TrainRequest()))
    layer: Any = next(each for name, each in model.named_modules() if name.endswith("up_proj"))
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=1e-4)
        layer.base_layer.bias.normal_()
    return model, layer


def of_peft(layer: Any, x: torch.Tensor) -> torch.Tensor:
    plain: Any = type(layer).__mro__[1]
    found: torch.Tensor = plain.forward(layer, x)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_update_moves_the_sum_as_far_as_in_float32(tmp_path: Path, kind: str) -> None:
    model, layer = layer_of(tmp_path, kind, "bfloat16")
    x, base = torch.randn(64, 32, 128).bfloat16(), layer.base_layer
    with torch.no_grad():
        weight = base.weight.float() if kind == "none" else dequantized_weight(base)
        # As it is multiplied by.
        weight = weight.bfloat16().float()
        update = layer.lora_B["default"](layer.lora_A["default"](x.float()))
        update *= layer.scaling["default"]
        exact = x.float() @ weight.t() + base.bias.float()
        with compute_in(model, "cpu", torch.bfloat16):
            found = layer(x)
            plain = of_peft(layer, x)
    assert found.shape == (64, 32, 256)
    assert found.dtype == torch.bfloat16
    # What most sums gain is far less than lies between them and the next number of bfloat16.
    assert float(update.abs().median()) < 0.1 * float(exact.abs().median()) * 2**-8

    assert abs(arrived(found.float(), exact, update) - 1) < 0.2
    assert abs(arrived(plain.float(), exact, update)) < 0.5


def arrived(found: torch.Tensor, exact: torch.Tensor, update: torch.Tensor) -> float:
    """Return how much of an update is in sums, on average over all."""
    return float(((found - exact) * update).sum() / (update * update).sum())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_in_float32_a_quantized_product_and_its_gradients_are_pefts(
    tmp_path: Path, kind: str
) -> None:
    _, layer = layer_of(tmp_path, kind, "float32")
    base = layer.base_layer
    adding = adding_product(base)
    assert adding is not None
    x, slopes = torch.randn(3, 7, 128, requires_grad=True), torch.randn(3, 7, 256)
    learning = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    # Before and after the layer's own first product, which moves what int8 weights are scaled by.
    for _ in range(2):
        update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        found = adding(base, update, x) + base.bias
        right = of_peft(layer, x)
        torch.testing.assert_close(
            found, right, atol=1e-5 * float(right.detach().abs().max()), rtol=0
        )
        pairs = zip(
            torch.autograd.grad(found, learning, slopes),
            torch.autograd.grad(right, learning, slopes),
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()), rtol=0)


# The compiler calls what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compiled_it_computes_the_same_and_keeps_no_weight_unpacked(tmp_path: Path) -> None:
    model, layer = layer_of(tmp_path, "nf4", "bfloat16")
    x, slopes = (
        torch.randn(2, 9, 128).bfloat16().requires_grad_(),
        torch.randn(2, 9, 256).bfloat16(),
    )
    weight = dequantized_weight(layer.base_layer).bfloat16()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def learned(forward: Any) -> list[torch.Tensor]:
        adapter = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with compute_in(model, "cpu", torch.bfloat16):
            found = forward(x)
        return [found.detach(), *torch.autograd.grad(found, [x, *adapter], slopes)]

    plain = learned(layer.forward)
    # As layers are compiled, but for the machine code, which takes longest.
    backend = "aot_eager_decomp_partition"
    compiled: Any = torch.compile(layer.forward, backend=backend, dynamic=True, fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for one, other in zip(plain, learned(compiled), strict=True):
            torch.testing.assert_close(other, one, atol=2**-7 * float(one.abs().max()), rtol=0)
    assert any(each.dtype == torch.uint8 for each in kept)
    assert not any(torch.equal(each, weight) or torch.equal(each, weight.T) for each in kept)


def test_torch_knows_the_operators(tmp_path: Path) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    update, x = (torch.randn(2, 5, width, requires_grad=True) for width in (256, 128))
    _, layer = layer_of(tmp_path / "nf4", "nf4", "float32")
    weight = layer.base_layer.weight
    state, outer = weight.quant_state, weight.quant_state.state2
    packed = (weight, state.blocksize, state.absmax, outer.blocksize, outer.absmax, outer.code)
    torch.library.opcheck(add_nf4_product, (update, x, *packed, state.offset), test_utils=checks)
    whole = torch.randint(-127, 128, (256, 128), dtype=torch.int8)
    torch.library.opcheck(add_int8_product, (update, x, whole, torch.rand(256)), test_utils=checks)
