"""The log-probabilities of a micro-batch's label tokens, and nothing else."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mst.data.encode import IGNORE as IGNORE_INDEX
from mst.training.batches import Batch
from mst.training.image_inputs import TYPES

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def compute_in(model: torch.nn.Module, device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """Run matrix products in `dtype` while trained weights stay float32.

    bfloat16 goes through autocast. PEFT would otherwise cast the activations up to its float32
    adapters before each product, which made a step 15 % slower on a CPU.
    """
    import torch

    if dtype == torch.float32:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device_type, dtype))
        if hasattr(model, "peft_config"):
            from peft.helpers import disable_input_dtype_casting

            stack.enter_context(disable_input_dtype_casting(model))
        yield


def keeps_logits(model: torch.nn.Module) -> bool:
    """Return whether the model can compute logits at chosen positions only."""
    return "logits_to_keep" in _parameters(model)


def _parameters(model: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    whole: Any = model
    inner = whole.get_base_model() if hasattr(model, "peft_config") else whole
    return inspect.signature(inner.forward).parameters


def accepts(model: torch.nn.Module, name: str) -> bool:
    """Return whether the forward pass takes an argument, by name or among any others."""
    parameters = _parameters(model)
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def forward_arguments(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what the forward pass is called with."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids}
    # Models without positions (Mamba) or without a cache take no such argument.
    for name, value in (("position_ids", batch.position_ids), ("use_cache", False)):
        if accepts(model, name):
            arguments[name] = value
    if batch.images:
        # Where images stand, positions may go along their sides: the model works them out.
        arguments.pop("position_ids", None)
        named = _parameters(model)
        arguments |= {
            name: value for name, value in batch.images.items() if name != TYPES or name in named
        }
    if batch.attention_mask is not None:
        arguments["attention_mask"] = batch.attention_mask
    return arguments


def token_log_probs(
    model: torch.nn.Module, batch: Batch, selective: bool, temperature: float = 1.0
) -> torch.Tensor:
    """Return the log-probability of each of a micro-batch's targets (rows, kept), as float32.

    Those without a label are 0.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: from `collate`.
        selective: what `keeps_logits` said; saves the output head's work on prompt tokens.
        temperature: that the logits are divided by.
    """
    import torch.nn.functional as functional

    arguments = forward_arguments(model, batch)
    if selective:
        logits = model(**arguments, logits_to_keep=batch.keep).logits
    else:
        logits = model(**arguments).logits[:, batch.keep]
    logits = logits.flatten(0, 1).float()
    losses = functional.cross_entropy(
        logits if temperature == 1 else logits / temperature,
        batch.targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return -losses.view_as(batch.targets)


def summed_loss(model: torch.nn.Module, batch: Batch, selective: bool) -> torch.Tensor:
    """Return the sum of the cross-entropies of a micro-batch's label tokens, as float32.

    Args: as `token_log_probs`.
    """
    return -token_log_probs(model, batch, selective).sum()
