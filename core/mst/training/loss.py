"""The log-probabilities of a micro-batch's label tokens, and nothing else."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from mst.data.encode import IGNORE as IGNORE_INDEX
from mst.training.adapters import under_adapters
from mst.training.batches import Batch
from mst.training.image_inputs import TYPES
from mst.training.output_head import HeadForm, decoder_and_head

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


def last_logits(model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    """Return what the forward pass is called with to compute no logits but each row's last.

    As an index, which copies what it picks. The number 1 makes a slice, and for one that is not
    contiguous torch 2.13.0 repeats the output head's weights for every row: SmolLM2-135M's took
    864 MiB and 7 s for 16 rows, instead of 3 MiB and 0.04 s (two cores of an Intel Xeon with AMX,
    busy with other work).

    Args:
        model: of transformers; one that always computes all logits gets no argument.
        device: of its inputs.
    """
    import torch

    if not keeps_logits(model):
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=device)}


def _parameters(model: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(under_adapters(model).forward).parameters


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
    mask = batch.attention_mask
    if mask is not None:
        # A mask for every row is a view, as those that transformers makes: compiled layers tell
        # views from other tensors, and would be compiled anew.
        arguments["attention_mask"] = mask.view_as(mask) if mask.dim() == 4 else mask
    return arguments


# How a model's logits are had: of all positions, of those that are needed, or, where it is known
# what the model makes of its head's product, of a few labels at a time.
Logits = Literal["all", "kept"] | HeadForm


def logits_of(model: torch.nn.Module) -> Logits:
    """Return how the model itself computes logits: at chosen positions only, if it can."""
    return "kept" if keeps_logits(model) else "all"


def label_log_probs(
    model: torch.nn.Module, batch: Batch, how: Logits, temperature: float = 1.0
) -> torch.Tensor:
    """Return the log-probability of each of a micro-batch's labels (label tokens,), as float32.

    They come in the order of `Batch.labelled`.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: from `collate`, or from `mst.training.shared_lines.collate_shared`.
        how: logits are had.
        temperature: that the logits are divided by.
    """
    import torch.nn.functional as functional

    arguments = forward_arguments(model, batch)
    if isinstance(how, HeadForm):
        return _from_hidden_states(model, batch, how, temperature, arguments)
    if how == "kept":
        logits = model(**arguments, logits_to_keep=batch.keep).logits
    else:
        logits = model(**arguments).logits[:, batch.keep]
    logits = logits.flatten(0, 1).float()
    if temperature != 1:
        logits = logits / temperature
    if batch.labels is not None:
        found: torch.Tensor = functional.log_softmax(logits, dim=-1)[batch.labelled, batch.labels]
        return found
    losses = functional.cross_entropy(
        logits, batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses[batch.labelled]


def token_log_probs(
    model: torch.nn.Module, batch: Batch, how: Logits, temperature: float = 1.0
) -> torch.Tensor:
    """Return the log-probability of each of a micro-batch's targets (rows, kept), as float32.

    Those without a label are 0.

    Args:
        model: as of `label_log_probs`.
        batch: from `collate`; no rows share their beginnings.
        how: logits are had.
        temperature: that the logits are divided by.
    """
    values = label_log_probs(model, batch, how, temperature)
    spread = values.new_zeros(batch.targets.numel())
    return spread.scatter(0, batch.labelled, values).view_as(batch.targets)


def _from_hidden_states(
    model: torch.nn.Module,
    batch: Batch,
    form: HeadForm,
    temperature: float,
    arguments: Mapping[str, Any],
) -> torch.Tensor:
    from mst.training.chunked_loss import chunked_log_probs

    decoder, head = decoder_and_head(model)
    lines = batch.labelled // len(batch.keep)
    columns = batch.keep[batch.labelled % len(batch.keep)]
    hidden = decoder(**arguments).last_hidden_state[lines, columns]
    labels = batch.targets.flatten()[batch.labelled] if batch.labels is None else batch.labels
    return chunked_log_probs(hidden, head, labels, form, temperature)


def summed_loss(model: torch.nn.Module, batch: Batch, how: Logits) -> torch.Tensor:
    """Return the sum of the cross-entropies of a micro-batch's label tokens, as float32.

    Args: as `label_log_probs`.
    """
    return -label_log_probs(model, batch, how).sum()
