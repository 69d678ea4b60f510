"""A first forecast of the peak memory of a training step, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mst.configuration import Configuration
from mst.model.facts import LinearShape, ModelFacts, lora_parameters, lora_targets
from mst.plan import MemoryForecast

# Resident size of Python with torch, transformers and peft loaded and a first product done:
# measured on Linux x86_64, torch 2.13.0 CPU build, transformers 5.23.0, peft 0.21.2.
RUNTIME_BYTES = 620 * 2**20
# Activations that a decoder keeps for its backward pass, in units of (inputs + outputs) of its
# linear layers: residuals, norms in float32 and the attention's inputs come on top of the linear
# layers' own inputs. SmolLM2-135M saves 1.18 for the backward pass; the rest is what is in flight
# then, fitted on the demo's peak.
ACTIVATION_FACTOR = 1.45
# Of the logits, cross-entropy holds: the output head's dtype, its float32 copy, the
# log-probabilities and the gradients of both float32 copies.
LOGITS_BYTES_PER_VALUE = 2 + 4 + 4 + 4 + 2
# AdamW keeps two moments in float32.
ADAMW_BYTES_PER_WEIGHT = 8
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StepShape:
    """The largest micro-batch: what the activations are counted for.

    Attributes:
        tokens: tokens in it, padding included.
        label_tokens: positions whose logits are computed.
        mask_values: values of dense attention masks (tokens squared when packed, else 0).
        rows: rows of the tensors: 1 when packed.
        width: their width; 0 when unknown.
    """

    tokens: int
    label_tokens: int
    mask_values: int = 0
    rows: int = 1
    width: int = 0


def _linear_width(linears: Sequence[LinearShape]) -> int:
    return sum(each.out_features + each.in_features for each in linears)


def forecast(
    model: ModelFacts,
    configuration: Configuration,
    step: StepShape,
    available_bytes: int | None,
    on_host: bool = True,
) -> MemoryForecast:
    """Predict the peak memory of training `model`.

    Args:
        model: its shape.
        configuration: how it is trained.
        step: the largest micro-batch.
        available_bytes: copied into the result.
        on_host: the device is the CPU, so that libraries and kernels' workspaces count too; on
            others they lie in the driver's own memory, and are not forecast yet.
    """
    width = FLOAT_BYTES[configuration.compute_dtype]
    weights = model.parameters * FLOAT_BYTES[configuration.weights_dtype]
    if configuration.tuner == "full":
        trained, added = model.parameters, 0
    else:
        targets = lora_targets(model, configuration.target_modules)
        trained = lora_parameters(targets, configuration.lora_rank)
        added = trained * 4
    kept = step.tokens * width * ACTIVATION_FACTOR * _linear_width(model.linears)
    if configuration.checkpointing:
        layer_inputs = step.tokens * width * model.hidden_size * model.layers
        kept = layer_inputs + kept / model.layers
    # The boolean mask is shared; each layer that keeps its activations keeps a float copy too.
    copies = 1 if configuration.checkpointing else model.layers
    kept += step.mask_values * (1 + width * copies)
    # Autocast keeps a copy of every trained weight in the compute dtype during a forward pass.
    lower = configuration.compute_dtype != configuration.weights_dtype
    casts = trained * width if lower or configuration.tuner != "full" else 0
    return MemoryForecast(
        runtime_bytes=RUNTIME_BYTES if on_host else 0,
        weights_bytes=weights,
        trainable_bytes=added + casts,
        gradients_bytes=trained * 4,
        optimizer_bytes=trained * ADAMW_BYTES_PER_WEIGHT,
        activations_bytes=int(kept),
        logits_bytes=step.label_tokens * model.vocab_size * LOGITS_BYTES_PER_VALUE,
        available_bytes=available_bytes,
    )
