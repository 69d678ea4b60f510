"""Loading the base model and choosing what is trained in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mst.errors import ModelError
from mst.model.files import read_config
from mst.model.structure import NOT_QUANTIZED, adaptable, auto_class, has_towers, score_class
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.seal.supply.model_files import check_adapter_files
from mst.training.quantization import hold_still, quantization_config
from mst.training.tensor_files import ADAPTER_WEIGHTS, file_name, read_weights

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from mst.request import TrainRequest


def load_model(
    directory: Path,
    dtype: str,
    attention: str,
    device: torch.device,
    quantization: str = "none",
    compute_dtype: str | None = None,
    score_pad_token_id: int | None = None,
    keys: KeyRing = NO_KEYS,
) -> torch.nn.Module:
    """Load a causal language model from a local directory, safetensors only, no code from it.

    Quantized layers go from the file to the device one by one: the whole model in `dtype` is
    never in memory.

    Args:
        directory: may be read-only.
        dtype: torch dtype name of the weights ("bfloat16", "float32").
        attention: transformers' attention implementation; models that lack it get eager.
        device: where the weights go.
        quantization: of the linear layers: "none", "nf4" or "int8".
        compute_dtype: of the products with quantized weights; default `dtype`.
        score_pad_token_id: load a reward model instead, which has a head for one score in place of
            the language model's and reads it at the last token that is not this one. A head that
            the directory lacks is drawn from torch's random numbers.
        keys: of the encrypted run whose weights lie there; none where they are plain.

    Raises:
        ModelError: transformers can't load it, or it is to be quantized and bitsandbytes is not
            here; says why.
    """
    import torch
    from transformers.utils import logging

    untyped: Any = logging
    untyped.disable_progress_bar()
    if score_pad_token_id is not None:
        untyped.set_verbosity_error()  # it warns that the head is new, as it must be
    arguments = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if quantization != "none":
        arguments |= _quantizing(directory, quantization, compute_dtype or dtype)
        arguments["device_map"] = {"": device}
    try:
        model = _from_files(directory, arguments, score_pad_token_id, keys)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot load the model in {directory}: {lines[0][:300]}."
            " Check that transformers knows the architecture and that every file is whole."
        ) from None
    if quantization != "none":
        hold_still(model)
        return model
    model = model.to(device)
    # On a device of its own kind torch moves each tensor alone: tied weights come apart, and
    # full tuning would train an output head that the saved model does not have.
    cast("Any", model).tie_weights()
    return model


def _quantizing(directory: Path, quantization: str, compute_dtype: str) -> dict[str, Any]:
    """Return what transformers is told in order to quantize linear layers as it reads them."""
    found = read_config(directory)
    if "quantization_config" in found:
        raise ModelError(f"{directory} is quantized already. Give the model that it was made from.")
    config = quantization_config(quantization, compute_dtype)
    if kept := NOT_QUANTIZED.get(found.get("model_type", "")):
        config.llm_int8_skip_modules = [*kept, "lm_head"]
    return {"quantization_config": config}


def _from_files(
    directory: Path, arguments: dict[str, Any], score_pad_token_id: int | None, keys: KeyRing
) -> torch.nn.Module:
    """Have transformers read a model; eager attention where it has none of the kind asked for."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    auto = auto_class(config)
    arguments = arguments | {
        "local_files_only": True, "use_safetensors": True, "trust_remote_code": False,
    }  # fmt: skip
    if score_pad_token_id is not None:
        auto = score_class(config)
        config.num_labels, config.pad_token_id = 1, score_pad_token_id
        arguments["config"] = config
    source = None if keys.key_files else directory
    if source is None:
        auto, config = _class_of(auto, config)
        arguments |= {"config": config, "state_dict": read_weights(directory, keys)}
    model: Any
    try:
        model = auto.from_pretrained(source, **arguments)
    except ValueError as error:
        if "attn_implementation" not in str(error) and "attention" not in str(error):
            raise
        model = auto.from_pretrained(source, **arguments | {"attn_implementation": "eager"})
    if source is None and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    found: torch.nn.Module = model
    return found


def _class_of(auto: Any, config: Any) -> tuple[Any, Any]:
    """Return the class that an auto class chooses, and its config.

    transformers takes weights from memory only where it is given no directory, and its auto
    classes want one.
    """
    import torch

    with torch.device("meta"):
        empty = auto.from_config(config)
    return type(empty), empty.config


def lora_config(request: TrainRequest) -> LoraConfig:
    """Return PEFT's configuration for what the user asked."""
    from peft import LoraConfig

    targets = request.target_modules
    return LoraConfig(
        r=request.lora_rank,
        lora_alpha=request.lora_alpha,  # type: ignore[arg-type]  # PEFT divides; floats are fine
        lora_dropout=request.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        use_rslora=request.use_rslora,
        use_dora=request.use_dora,
        # PEFT trains and saves the new head of a classifier whole, beside the adapters.
        task_type="SEQ_CLS" if request.task == "rm" else "CAUSAL_LM",
    )


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep one warning from the user while a PeftModel is built, and no other."""
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that the latter has deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def prepare_model(model: torch.nn.Module, config: LoraConfig | None = None) -> torch.nn.Module:
    """Return the model ready to be trained: with adapters, or whole when `config` is None.

    Base weights are frozen under adapters; the adapters' weights are float32 whatever the base's
    dtype, because AdamW's small updates vanish in bfloat16.
    """
    if config is None:
        model.requires_grad_(True)
    else:
        from peft import get_peft_model

        from mst.training.fused_adapters import fuse_adapters

        if config.target_modules == "all-linear":
            config.target_modules = _all_linear(model)
        elif has_towers(model):
            config.target_modules = _named_beside_towers(model, config.target_modules)
        with quiet_peft():
            model = get_peft_model(model, config)
        for _, parameter in trained_parameters(model):  # a reward model's head is not an adapter
            parameter.data = parameter.data.float()
        fuse_adapters(model)
    model.train()
    return model


def _all_linear(model: torch.nn.Module) -> list[str]:
    """Return what PEFT is told for all-linear: the layers' last names where these tell them apart.

    PEFT's own rule refuses Mamba, breaks on routers that look like linear layers, and adapts
    towers for images that no text passes.
    """
    names = set(adaptable(model))
    last = {name.rpartition(".")[2] for name in names}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if found == names else names)


def _named_beside_towers(model: torch.nn.Module, targets: Any) -> Any:
    """Return the language model's modules that end in one of `targets`; `targets` where none does.

    PEFT would adapt a tower's layers of the same name, such as CLIP's q_proj beside Llama's.
    """
    ends = tuple(f".{each}" for each in targets)
    return [name for name in adaptable(model) if f".{name}".endswith(ends)] or targets


def with_adapter(model: torch.nn.Module, adapter: str, keys: KeyRing = NO_KEYS) -> torch.nn.Module:
    """Return the model with the adapter of a directory on top.

    Args:
        model: its base.
        adapter: the directory.
        keys: of the encrypted run that it is of; none where it is plain.

    Raises:
        ModelError: the directory holds no plain LoRA in safetensors, or names code.
        EncryptionError: an encrypted one doesn't open.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    directory = Path(adapter)
    check_adapter_files(directory, file_name(ADAPTER_WEIGHTS, keys))
    found: Any
    with quiet_peft():
        if not keys.key_files:
            found = PeftModel.from_pretrained(cast("Any", model), adapter)
        else:
            config = PeftConfig.from_pretrained(adapter)
            config.inference_mode = True
            found = get_peft_model(cast("Any", model), config)
            set_peft_model_state_dict(found, read_weights(directory, keys))
    return cast("torch.nn.Module", found)


def merge_and_unload(model: torch.nn.Module) -> torch.nn.Module:
    """Return the base model with the adapters added into its weights, all in float32.

    Merged in float32 because a bfloat16 merge changed the most likely token in 4 % of positions
    (SmolLM2-135M); cast afterwards with `model.to(torch.bfloat16)`.
    """
    whole = cast("Any", model.float())
    merged: torch.nn.Module = whole.merge_and_unload()
    return merged


def under_adapters(model: torch.nn.Module) -> Any:
    """Return the transformers model that PEFT has wrapped; one without adapters is it itself."""
    whole = cast("Any", model)
    return whole.get_base_model() if hasattr(model, "peft_config") else whole


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of the model's decoder, first to last, as transformers checkpoints them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = under_adapters(model).get_decoder()
    return [each for each in decoder.modules() if isinstance(each, GradientCheckpointingLayer)]


def enable_checkpointing(
    model: torch.nn.Module, layers: int | None = None, row_gradients: bool = False
) -> None:
    """Recompute each layer's activations in the backward pass, or those of the first layers.

    The backward pass comes to the first layers last: what they would keep lives longest, and when
    they are computed again, what the others have kept is gone. Megatron-LM's "block" method takes
    the first for the same reason.

    Args:
        model: ready to be trained.
        layers: of the decoder's first so many; None for all, and for those of towers beside it.
        row_gradients: Opacus's hooks see the recomputed pass alone, as torch's older form has it;
            in the newer one they would keep what the first pass met.
    """
    inner = under_adapters(model)
    arguments = {"use_reentrant": False, "context_fn": _same_casts(model)}
    if row_gradients:
        arguments = {"use_reentrant": True}
        inner.enable_input_require_grads()
    # transformers 5.23 renamed it and warns at the old name; 5.17 knows only the old one.
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable(arguments)
    else:
        inner.gradient_checkpointing_enable(arguments)
    for each in decoder_layers(model)[layers:] if layers is not None else ():
        each.gradient_checkpointing = False  # type: ignore[assignment]


def _same_casts(model: torch.nn.Module) -> Callable[[], tuple[Any, Any]]:
    """Return torch's `context_fn`: adapters cast their inputs in both passes, or in neither.

    torch puts autocast back for the second pass, but PEFT's switch, which `compute_in` turns off,
    is on again by then: with dropout the two passes would keep unlike tensors, and torch raises.
    """
    switch = "cast_input_dtype_enabled"
    layers = [each for each in model.modules() if hasattr(each, switch)]

    @contextlib.contextmanager
    def switched(on: bool) -> Iterator[None]:
        before = [getattr(each, switch) for each in layers]
        for each in layers:
            setattr(each, switch, on)
        try:
            yield
        finally:
            for each, value in zip(layers, before, strict=True):
                setattr(each, switch, value)

    def contexts() -> tuple[Any, Any]:
        on = all(getattr(each, switch) for each in layers)
        return contextlib.nullcontext(), switched(on)

    return contexts


def trained_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and weights that the optimizer changes, in a fixed order."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
