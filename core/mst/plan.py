"""The plan: what a job will do, and why, before it does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One choice: its name, the value chosen, and why (what was needed, what was there)."""

    choice: str
    value: str
    why: str


@dataclass(frozen=True)
class MemoryForecast:
    """Predicted peak memory of the training process, in bytes, by what holds it.

    Attributes:
        runtime_bytes: interpreter, libraries and kernels' workspaces.
        weights_bytes: the base model.
        trainable_bytes: weights that LoRA adds (0 in full tuning, where they are the base).
        gradients_bytes: gradients of the trained weights.
        optimizer_bytes: AdamW's two moments.
        activations_bytes: what the backward pass keeps, at the largest micro-batch.
        logits_bytes: the loss over label positions and its gradient.
        available_bytes: what the device has free; None when the device cannot tell.
    """

    runtime_bytes: int
    weights_bytes: int
    trainable_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    available_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts."""
        return (
            self.runtime_bytes
            + self.weights_bytes
            + self.trainable_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
        )


@dataclass(frozen=True)
class Plan:
    """Everything the worker needs to know; it never probes and never decides.

    Attributes:
        backend: backend name; `mst_activate` of that backend is called in the worker.
        torch_devices: what torch calls each rank's device in its worker, with its index where
            it has one.
        distributed_backend: torch.distributed's name for the devices' collectives.
        strategy: "single", or "ddp" when every device holds the whole model.
        tuner: "lora" or "full".
        compute_dtype: dtype of the matrix products.
        weights_dtype: dtype in which the base weights are held.
        attention: attention implementation of transformers.
        threads: CPU threads for each worker's kernels.
        environment: variables set before the worker's interpreter starts.
        max_length: longest row in tokens that is trained on.
        per_device_train_batch_size: rows a micro-batch.
        gradient_accumulation_steps: micro-batches an optimizer step.
        gradient_checkpointing: recompute activations in the backward pass.
        learning_rate: peak of the schedule.
        train_rows: rows that are trained on.
        val_rows: rows held out.
        steps_per_epoch: optimizer steps in one pass over the training rows.
        total_steps: optimizer steps in all.
        label_accuracy: measure accuracy over the set of answers, before and after.
        reasons: one for each choice above that was not the user's.
        warnings: what the user should know before it starts.
    """

    backend: str
    torch_devices: tuple[str, ...]
    distributed_backend: str
    strategy: str
    tuner: str
    compute_dtype: str
    weights_dtype: str
    attention: str
    threads: int
    environment: Mapping[str, str]
    max_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    learning_rate: float
    train_rows: int
    val_rows: int
    steps_per_epoch: int
    total_steps: int
    label_accuracy: bool
    memory: MemoryForecast
    reasons: tuple[Reason, ...]
    warnings: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Rows an optimizer step, on all devices."""
        per_device = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return per_device * len(self.torch_devices)
