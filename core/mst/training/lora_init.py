"""Adapters that begin with what 4 bits have lost, weighed by what the layers really see.

LoRA begins with B = 0: the first step computes with the quantized weights alone. Here A and B
begin as the best approximation of rank r of (W - Q) diag(s), where s is the root mean square of
each input over some of the training rows: QERA-approx, Zhang et al. 2024, "QERA: an Analytical
Framework for Quantization Error Reconstruction", theorem 2. The quantized weights stay as they
are, so that checkpoints, resuming and merging know nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.model.files import weight_files
from mst.training.loss import accepts
from mst.training.quantization import dequantized_weight, quantized_layers

if TYPE_CHECKING:
    import torch

    from mst.data.encode import Example
    from mst.request import TrainRequest

# Rows that the inputs are measured on. SmolLM2's start was as good with 32 as with 128.
MEASURED_ROWS = 32
# Of a row; the inputs of later tokens are alike.
MEASURED_TOKENS = 1024
# Extra columns and iterations of the randomized decomposition: Halko et al. 2011, section 4.5.
_OVERSAMPLING = 8
_ITERATIONS = 4


def wanted(quantization: str, request: TrainRequest) -> bool:
    """Return whether the adapters begin this way; "auto" does it for 4 bits.

    DoRA's magnitudes are taken from the weights that adapters begin with, so it begins as ever.
    Preferences take the model without adapters as their reference, from which "auto" does not
    begin apart.
    """
    if request.use_dora or quantization == "none":
        return False
    asked = request.init_lora_weights
    likelihood = request.task in ("sft", "pt")
    return asked == "qera" or (asked == "auto" and quantization == "nf4" and likelihood)


def begin_with_error(
    model: torch.nn.Module, directory: Path, examples: Sequence[Example], device: torch.device
) -> int:
    """Set the adapters on quantized layers; return how many layers have one that begins so.

    A layer whose weight the files hold under another name begins as ever.

    Args:
        model: with fresh adapters on quantized layers.
        directory: of the weights that were quantized, safetensors.
        examples: the training rows; some of them are looked at.
        device: where the model is.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    layers = dict(_adapted(model))
    names = {name: _in_files(name) for name in layers}
    with _weights(directory) as stored:
        found = {name: each for name, each in layers.items() if names[name] in stored.names}
        if not found:
            return 0
        scales = _input_scales(model, found, _spread(examples), device)
        # The decomposition draws a random matrix; the run's own draws stay as they are.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for name, layer in found.items():
                base, weight = layer.get_base_layer(), stored.read(names[name]).float()
                if getattr(base, "source_cls", None) is Conv1D:  # its files have (in, out)
                    weight = weight.T
                _set(layer, weight - dequantized_weight(base).cpu(), scales[name])
    return len(found)


def _adapted(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have both quantized weights and an adapter."""
    modules = dict(model.named_modules())
    for name, _ in quantized_layers(model):
        outer = modules.get(name.removesuffix(".base_layer"))
        if name.endswith(".base_layer") and hasattr(outer, "lora_A"):
            yield name.removesuffix(".base_layer"), outer


def _in_files(name: str) -> str:
    return name.removeprefix("base_model.model.") + ".weight"


def _spread(examples: Sequence[Example]) -> list[Example]:
    step = max(1, len(examples) // MEASURED_ROWS)
    chosen = [examples[place] for place in range(0, len(examples), step)[:MEASURED_ROWS]]
    return [each for each in chosen if len(each.input_ids)]  # a streamed row may be no use


class _Stored:
    """Tensors of safetensors files by name; each is read when it is asked for."""

    def __init__(self, places: dict[str, Any]) -> None:
        self._places = places
        self.names = frozenset(places)

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._places[name].get_tensor(name)
        return tensor


@contextlib.contextmanager
def _weights(directory: Path) -> Iterator[_Stored]:
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        places = {}
        for path in weight_files(directory):
            file = stack.enter_context(safe_open(path, "pt"))
            places.update(dict.fromkeys(file.keys(), file))
        yield _Stored(places)


def _input_scales(
    model: torch.nn.Module,
    layers: dict[str, Any],
    examples: Sequence[Example],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Return the root mean square of each input (in_features,) of each layer, on the CPU."""
    import torch

    squares: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str) -> Any:
        def look(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            squares[name] = squares.get(name, 0) + rows.square().sum(dim=0)
            counts[name] = counts.get(name, 0) + len(rows)

        return look

    training = model.training
    model.eval()
    hooks = [each.register_forward_pre_hook(seen(name)) for name, each in layers.items()]
    arguments = {"use_cache": False, "logits_to_keep": 1}
    kept = {name: value for name, value in arguments.items() if accepts(model, name)}
    try:
        with torch.no_grad():
            for each in examples:
                ids = torch.tensor([each.input_ids[:MEASURED_TOKENS].tolist()], device=device)
                model(input_ids=ids, **kept)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    # An input that was never seen (an expert without a token) counts like the others.
    return {
        name: (squares[name] / counts[name]).sqrt().cpu() if name in squares else torch.ones(1)
        for name in layers
    }


def _set(layer: Any, error: torch.Tensor, scale: torch.Tensor) -> None:
    """Let B A times LoRA's scaling be the error's best approximation for inputs of this scale."""
    import torch

    name = layer.active_adapters[0]
    rank = layer.r[name]
    # No input is dropped altogether: what these rows don't show, others may.
    weighed = scale.clamp(min=1e-2 * float(scale.mean()) + 1e-12)
    columns = min(rank + _OVERSAMPLING, *error.shape)
    left, values, right = torch.svd_lowrank(error * weighed, q=columns, niter=_ITERATIONS)
    rank = min(rank, columns)
    root = (values[:rank] / layer.scaling[name]).sqrt()
    first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
    first[:rank].copy_(root[:, None] * right[:, :rank].T / weighed)
    second[:, :rank].copy_(left[:, :rank] * root)
