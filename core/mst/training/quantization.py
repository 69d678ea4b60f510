"""Frozen linear layers in 4 or 8 bits, by bitsandbytes, and back again.

NF4 in blocks of 64 with their scales quantized too (Dettmers et al. 2023, "QLoRA", section 3), or
LLM.int8() with one scale a row (Dettmers et al. 2022, "LLM.int8()", section 3). Everything else of
the model stays in the dtype that it is loaded in: embeddings, output head, norms, biases, routers
and fused experts. Norms are not raised to float32 as `peft.prepare_model_for_kbit_training` does:
LoRA leaves them too, transformers computes them in float32 inside, and with the embeddings and the
head, which that function raises as well, it would take back most of what 4 bits save.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from mst.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

INSTALL = "python -m pip install 'mst-train[qlora]'"
# Activations above this stay out of the 8-bit product (LLM.int8(), section 3.2).
OUTLIER_THRESHOLD = 6.0
# What transformers leaves on a model that it has quantized.
_MARKS = (
    "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer",
)  # fmt: skip


def import_bitsandbytes() -> Any:
    """Return the module bitsandbytes, loaded without a look at the network.

    Raises:
        ModelError: it is not installed, or its import fails.
    """
    with _hidden("kernels"):
        # On a CPU with AVX512-BF16, version 0.50 fetches native code from a hub at its import
        # when the package `kernels` is there, and grumbles when it is not; later it says of every
        # int8 product that its input is cast.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            import bitsandbytes
        except ImportError as error:
            raise ModelError(
                "quantized layers and 8-bit optimizers need bitsandbytes, which can't be loaded"
                f" here ({str(error)[:200]}). Install it: {INSTALL}"
            ) from None
    return bitsandbytes


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let a package look as if it were not installed."""
    modules: dict[str, Any] = sys.modules
    before = {key: modules.pop(key) for key in list(modules) if key.partition(".")[0] == name}
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]
        modules.update(before)


def quantization_config(quantization: str, compute_dtype: str) -> BitsAndBytesConfig:
    """Return transformers' configuration for "nf4" or "int8".

    The output head, tied embeddings and the model's last module are left alone by transformers
    (`get_keys_to_not_convert` in quantizers/base.py).

    Args:
        quantization: "nf4" or "int8".
        compute_dtype: torch name of the dtype in which products with NF4 weights are made; those
            with int8 weights take the dtype of the activations.

    Raises:
        ModelError: bitsandbytes can't be loaded.
    """
    import_bitsandbytes()
    import torch
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": getattr(torch, compute_dtype),
    }
    if quantization == "int8":
        options = {"load_in_8bit": True, "llm_int8_threshold": OUTLIER_THRESHOLD}
    made: BitsAndBytesConfig = cast("Any", BitsAndBytesConfig)(**options)
    return made


def quantized_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the names and layers that hold quantized weights; none where bitsandbytes is not."""
    loaded: Any = sys.modules.get("bitsandbytes")
    if loaded is None:
        return
    kinds = (loaded.nn.Linear4bit, loaded.nn.Linear8bitLt)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def hold_still(model: torch.nn.Module) -> None:
    """Let evaluation compute with the quantized weights as training does, and leave them alone.

    bitsandbytes 0.50 goes other ways on a CPU in evaluation mode. With AVX512-BF16 it packs NF4
    weights anew for a faster product, rounds their scales to bfloat16 on the way (SmolLM2-135M:
    another most likely token at 8 % of positions) and never undoes it, and the packed product has
    no gradient: one evaluation, and training no longer learns (held-out loss 5.05 after 30 steps
    instead of LoRA's 0.98). With int8 it rounds the inputs too, though a training step on a CPU
    does not: another most likely token at 25 % of positions of random text. On a GPU int8 rounds
    its inputs in both.
    """
    for _, layer in quantized_layers(model):
        weight: Any = layer.weight
        if weight.device.type == "cpu":
            layer.register_forward_pre_hook(_as_in_training)


def _as_in_training(layer: torch.nn.Module, _: object) -> None:
    layer.training = True


def dequantized_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return a quantized layer's weight (out_features, in_features), exactly, in float32."""
    import torch

    functional = import_bitsandbytes().functional
    weight: Any = layer.weight
    if weight.dtype == torch.int8:
        state: Any = layer.state
        scale = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        found: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, scale)
        return found.float()
    state = copy.copy(weight.quant_state)
    # The state names the dtype of the weights before; rounding to it would lose bits.
    state.dtype = torch.float32
    found = functional.dequantize_4bit(weight.data, state)
    return found


def dequantize(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with ordinary layers that hold what the quantized ones held, in float32.

    Changes `model`; its other weights become float32 too.
    """
    import torch

    for name, layer in list(quantized_layers(model)):
        model.set_submodule(name, _ordinary(layer))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
    _forget(model)
    return model


def _ordinary(layer: torch.nn.Module) -> torch.nn.Module:
    import torch
    from transformers.pytorch_utils import Conv1D

    weight, old = dequantized_weight(layer), layer
    bias: Any = old.bias
    new: torch.nn.Module
    with torch.device("meta"):
        if getattr(old, "source_cls", None) is Conv1D:
            new = cast("Any", Conv1D)(weight.shape[0], weight.shape[1])
            weight = weight.T.contiguous()
        else:
            new = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    new.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:  # Conv1D always has one
        new.bias = torch.nn.Parameter(bias.data.float(), requires_grad=False)
    return new.train(layer.training)


def _forget(model: torch.nn.Module) -> None:
    """Remove the marks by which transformers and PEFT know a quantized model."""
    for module in model.modules():
        for mark in _MARKS:
            module.__dict__.pop(mark, None)
        config = getattr(module, "config", None)
        for mark in ("quantization_config", "_is_quantized"):
            if config is not None and mark in vars(config):
                delattr(config, mark)


def compute_in_float32(model: torch.nn.Module) -> None:
    """Let a quantized model compute in float32; what its quantized layers hold stays the same."""
    import torch

    for _, layer in quantized_layers(model):
        layer.compute_dtype = torch.float32  # type: ignore[assignment]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
