"""The model that a trace runs: built without data at any depth, then given fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mst.memory_trace import TraceRequest
from mst.request import TrainRequest

if TYPE_CHECKING:
    import torch

# bitsandbytes: values that share an absolute maximum, and maxima that share one of their own.
NF4_BLOCK = 64
NF4_OUTER_BLOCK = 256


def build_config(asked: TraceRequest, layers: int | None) -> Any:
    """Return the model's configuration with `layers` layers; None for its own number."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        asked.model_directory, local_files_only=True, trust_remote_code=False
    )
    config = config.get_text_config() if hasattr(config, "text_config") else config
    if layers is not None:
        config.num_hidden_layers = layers
        for name, value in vars(config).items():
            # One entry a layer: kinds of attention, of feed-forward, …
            if isinstance(value, list) and name.endswith(("layer_types", "layers_block_type")):
                setattr(config, name, value[:layers])
    return config


def layer_period(asked: TraceRequest) -> int:
    """Return after how many layers their kinds repeat: 1 when all are alike."""
    kinds = getattr(build_config(asked, None), "layer_types", None)
    if not kinds:
        return 1
    return next(
        n
        for n in range(1, len(kinds) + 1)
        if all(kinds[i] == kinds[i % n] for i in range(len(kinds)))
    )


def build(asked: TraceRequest, layers: int, recomputed: int) -> torch.nn.Module:
    """Return the model as `mst.training.worker` prepares it, on torch's meta device.

    Args:
        asked: what is traced.
        layers: that it has.
        recomputed: of the first, how many are computed again in the backward pass.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mst.training.adapters import enable_checkpointing, lora_config, prepare_model

    made = asked.configuration
    config = copy.deepcopy(build_config(asked, layers))
    untyped: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = untyped.from_config(
            config,
            dtype=getattr(torch, made.weights_dtype),
            attn_implementation=made.attention,
        )
    if made.quantization == "nf4":
        _quantize(model, made.compute_dtype)
    request = TrainRequest(
        lora_rank=made.lora_rank, target_modules=made.target_modules, use_dora=made.use_dora
    )
    with torch.device("meta"):
        model = prepare_model(model, None if made.tuner == "full" else lora_config(request))
    if recomputed:
        enable_checkpointing(model, recomputed)
    whole: torch.nn.Module = model
    return whole


def decoder_layers(model: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """Return the decoder's layers: the longest list of modules."""
    import torch

    found: Sequence[torch.nn.Module] = ()
    for each in model.modules():
        if isinstance(each, torch.nn.ModuleList) and len(each) > len(found):
            found = list(each)
    return found


def _quantize(model: torch.nn.Module, compute_dtype: str) -> None:
    """Put a 4-bit layer for every linear layer but the output head, as transformers does."""
    import torch

    from mst.training.quantization import import_bitsandbytes

    linear4bit = import_bitsandbytes().nn.Linear4bit
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear or child is head:
                continue
            layer = linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=getattr(torch, compute_dtype),
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            layer.weight.requires_grad_(False)
            setattr(module, name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def materialized(model: torch.nn.Module) -> None:
    """Replace every parameter and buffer by one of the current fake mode; tied ones stay tied."""
    import torch

    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        quantized = type(module).__name__ in ("Linear4bit", "Params4bit")
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = (
                    _nf4(module, parameter)
                    if quantized and name == "weight"
                    else torch.nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype),
                        requires_grad=parameter.requires_grad,
                    )
                )
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _nf4(module: Any, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a packed weight with its constants, as quantization would leave them."""
    import torch

    from mst.training.quantization import import_bitsandbytes

    quant_state = import_bitsandbytes().functional.QuantState
    count = module.in_features * module.out_features
    blocks = -(-count // NF4_BLOCK)
    outer = quant_state(
        absmax=torch.empty(-(-blocks // NF4_OUTER_BLOCK)),
        code=torch.empty(256),
        blocksize=NF4_OUTER_BLOCK,
        dtype=torch.float32,
    )
    state = quant_state(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=module.compute_dtype,
        offset=torch.empty(()),
        state2=outer,
    )
    packed = torch.nn.Parameter(
        torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False
    )
    for name, value in {
        "quant_state": state,
        "bnb_quantized": True,
        "blocksize": NF4_BLOCK,
        "quant_type": "nf4",
        "compress_statistics": True,
    }.items():
        setattr(packed, name, value)
    module.quant_state = state
    return packed
