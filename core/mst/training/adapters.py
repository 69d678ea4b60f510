"""Loading the base model and choosing what is trained in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mst.errors import ModelError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from mst.request import TrainRequest


def load_model(
    directory: Path, dtype: str, attention: str, device: torch.device
) -> torch.nn.Module:
    """Load a causal language model from a local directory, safetensors only, no code from it.

    Args:
        directory: may be read-only.
        dtype: torch dtype name of the weights ("bfloat16", "float32").
        attention: transformers' attention implementation; models that lack it get eager.
        device: where the weights go.

    Raises:
        ModelError: transformers can't load it; says why.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    untyped: Any = logging
    untyped.disable_progress_bar()
    model: Any
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    try:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                directory, attn_implementation=attention, **arguments
            )
        except ValueError as error:
            if "attn_implementation" not in str(error) and "attention" not in str(error):
                raise
            model = AutoModelForCausalLM.from_pretrained(
                directory, attn_implementation="eager", **arguments
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot load the model in {directory}: {lines[0][:300]}."
            " Check that transformers knows the architecture and that every file is whole."
        ) from None
    loaded: torch.nn.Module = model
    return loaded.to(device)


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
        task_type="CAUSAL_LM",
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

        with quiet_peft():
            model = get_peft_model(model, config)
    model.train()
    return model


def merge_and_unload(model: torch.nn.Module) -> torch.nn.Module:
    """Return the base model with the adapters added into its weights, all in float32.

    Merged in float32 because a bfloat16 merge changed the most likely token in 4 % of positions
    (SmolLM2-135M); cast afterwards with `model.to(torch.bfloat16)`.
    """
    whole = cast("Any", model.float())
    merged: torch.nn.Module = whole.merge_and_unload()
    return merged


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Recompute each layer's activations in the backward pass."""
    whole = cast("Any", model)
    inner = whole.get_base_model() if hasattr(model, "peft_config") else whole
    # transformers 5.23 renamed it and warns at the old name; 5.17 knows only the old one.
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable({"use_reentrant": False})
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": False})


def trained_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the names and weights that the optimizer changes, in a fixed order."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
