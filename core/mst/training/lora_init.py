"""Adapters that begin with what 4 bits have lost, weighed by what the layers really see.

LoRA begins with B = 0: the first step computes with the quantized weights alone. Here B A begins
as what of rank r brings the layer's output nearest to that of the original weights, over the
inputs x that some training rows give it: the best approximation of (W - Q) L, where L L' is the
mean of x x', times the inverse of L (Zhang et al. 2024, "QERA: an Analytical Framework for
Quantization Error Reconstruction", theorem 1). Of wide inputs the squares alone are taken, L is
their roots (theorem 2). The quantized weights stay as they are, so that checkpoints, resuming and
merging know nothing of it.
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
# Of so many inputs, how they go together is measured too: 64 MiB a layer, and a second to factor.
JOINT_INPUTS = 4096
# Layers with that are measured in passes of so many bytes.
JOINT_BYTES = 2**30
# Share of the mean square that is added to each: what these rows don't show, others may. GPTQ's.
DAMPING = 0.01
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
        rows = _spread(examples)
        # The decomposition draws a random matrix; the run's own draws stay as they are.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for part in _parts(found):
                moments = _moments(model, part, rows, device)
                for name, layer in part.items():
                    base, weight = layer.get_base_layer(), stored.read(names[name]).float()
                    if getattr(base, "source_cls", None) is Conv1D:  # its files have (in, out)
                        weight = weight.T
                    _set(layer, weight - dequantized_weight(base).cpu(), moments[name])
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


def _parts(layers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the layers in parts whose moments take at most `JOINT_BYTES`."""
    part: dict[str, Any] = {}
    size = 0
    for name, layer in layers.items():
        inputs = layer.in_features
        own = 4 * inputs * (inputs if inputs <= JOINT_INPUTS else 1)
        if part and size + own > JOINT_BYTES:
            yield part
            part, size = {}, 0
        part[name], size = layer, size + own
    yield part


def _moments(
    model: torch.nn.Module,
    layers: dict[str, Any],
    examples: Sequence[Example],
    device: torch.device,
) -> dict[str, torch.Tensor | None]:
    """Return the mean of x x' (in_features, in_features) over the inputs of each layer, on the CPU.

    Of more than `JOINT_INPUTS` its diagonal (in_features,); None for a layer that saw no input, as
    an expert may.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str) -> Any:
        def look(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            joint = rows.shape[1] <= JOINT_INPUTS
            own = rows.T @ rows if joint else rows.square().sum(dim=0)
            sums[name] = sums[name] + own if name in sums else own
            counts[name] = counts.get(name, 0) + len(rows)

        return look

    training = model.training
    model.eval()
    hooks = [each.register_forward_pre_hook(seen(name)) for name, each in layers.items()]
    arguments = {"use_cache": False, "logits_to_keep": 1}
    kept = {name: value for name, value in arguments.items() if accepts(model, name)}
    try:
        for each in examples:
            ids = torch.tensor([each.input_ids[:MEASURED_TOKENS].tolist()], device=device)
            model(input_ids=ids, **kept)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return {
        name: (sums[name] / counts[name]).cpu() if counts.get(name) else None for name in layers
    }


def _set(layer: Any, error: torch.Tensor, moments: torch.Tensor | None) -> None:
    """Let B A, times LoRA's scaling, be what of its rank is nearest to the error."""
    import torch

    name = layer.active_adapters[0]
    columns = min(layer.r[name] + _OVERSAMPLING, *error.shape)
    rank = min(layer.r[name], columns)
    factor = None if moments is None else _factor(moments)
    weighed = error if factor is None else error @ factor if factor.dim() == 2 else error * factor
    left, values, right = torch.svd_lowrank(weighed, q=columns, niter=_ITERATIONS)
    root = (values[:rank] / layer.scaling[name]).sqrt()
    first = root[:, None] * right[:, :rank].T
    if factor is not None and factor.dim() == 2:
        first = torch.linalg.solve_triangular(factor, first, upper=False, left=False)
    elif factor is not None:
        first = first / factor
    layer.lora_A[name].weight[:rank].copy_(first)
    layer.lora_B[name].weight[:, :rank].copy_(left[:, :rank] * root)


def _factor(moments: torch.Tensor) -> torch.Tensor:
    """Return L of moments L L', lower triangular; of a diagonal its roots."""
    import torch

    joint = moments.dim() == 2
    mean = float((moments.diagonal() if joint else moments).mean())
    damping = DAMPING * mean + 1e-12
    if not joint:
        return (moments + damping).sqrt()
    found: torch.Tensor = torch.linalg.cholesky(moments + damping * torch.eye(len(moments)))
    return found
