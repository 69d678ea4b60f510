"""The plan: what a job will do, and why, before it does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mst.configuration import Configuration


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
        buffers_bytes: buckets and gathered layers of the collectives; on a CPU a checkpoint's copy
            that is being written.
        slack_bytes: what the allocator holds without using it, and kernels' workspaces.
        host_bytes: of the host's memory that offloading, or a checkpoint's copy that is being
            written, takes on this machine, all ranks; not a part of the device's peak.
    """

    runtime_bytes: int
    weights_bytes: int
    trainable_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    available_bytes: int | None
    buffers_bytes: int = 0
    slack_bytes: int = 0
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts on the device."""
        return (
            self.runtime_bytes
            + self.weights_bytes
            + self.trainable_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.buffers_bytes
            + self.slack_bytes
        )


@dataclass(frozen=True)
class TimeForecast:
    """Predicted duration, with the factor by which it may be wrong either way.

    Attributes:
        step_seconds: one optimizer step.
        total_seconds: all steps; loading, evaluation and saving not counted.
        uncertainty: the truth is expected between forecast / uncertainty and forecast times it.
        basis: where the speed comes from: "table: …", "measured: …".
    """

    step_seconds: float
    total_seconds: float
    uncertainty: float
    basis: str


@dataclass(frozen=True)
class Alternative:
    """A configuration that the planner looked at.

    Attributes:
        configuration: what it would be.
        peak_bytes: memory of one device that it would take.
        host_bytes: memory of the host.
        step_seconds: predicted; None when the device's speed is not known.
        trained_share: trained weights over all weights.
        why_not: "" when it can be chosen.
    """

    configuration: Configuration
    peak_bytes: int
    host_bytes: int
    step_seconds: float | None
    trained_share: float
    why_not: str = ""


@dataclass(frozen=True)
class PrivacyBudget:
    """What differential privacy a run's weights have, and what it rests on.

    Attributes:
        epsilon: that the accountant finds; at most what was asked for.
        delta: the chance that ε does not hold.
        unit: what is protected: "row", or the column whose equal values make one unit.
        units: how many the training data has.
        sample_rate: probability with which a unit takes part in a step.
        steps: optimizer steps, all of them.
        noise_multiplier: standard deviation of the noise, in units of `max_grad_norm`.
        max_grad_norm: to which a unit's gradient is clipped.
        accountant: which found `epsilon`, with its version.
        epsilon_checked: what the second accountant finds.
        checked_by: which that is.
    """

    epsilon: float
    delta: float
    unit: str
    units: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    accountant: str
    epsilon_checked: float
    checked_by: str = "mst.privacy.loss_distribution"


@dataclass(frozen=True)
class Plan:
    """Everything the worker needs to know; it never probes and never decides.

    Attributes:
        backend: backend name; `mst_activate` of that backend is called in the worker.
        torch_devices: what torch calls each rank's device in its worker, with its index where
            it has one.
        distributed_backend: torch.distributed's name for the devices' collectives.
        strategy: "single", "ddp" when every device holds the whole model, or "zero1", "zero2",
            "zero3" when DeepSpeed shares out the optimizer, the gradients, the weights too.
        tuner: "lora", "qlora" or "full".
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
        quantization: of the frozen linear layers: "none", "nf4" or "int8".
        optim: "adamw_torch", "adamw_8bit" or "paged_adamw_8bit".
        offload: what ZeRO keeps off the device: "none", "optimizer" or "parameters".
        offload_dir: directory on a local disk for that; None for the host's memory.
        nnodes: machines, each with as many devices as `torch_devices` names.
        time: how long it should take; None when the device's speed is not known.
        alternatives: what else was looked at, best first.
        privacy: what differential privacy the tuned weights will have; None for none.
        chunked_loss: logits are made of a few labels at a time, where the model allows.
        compiled: the decoder's layers are compiled before the first step.
        heap: of a CPU's worker, as in `mst.configuration.Configuration`.
        prefix_sharing: what rows of a line begin with alike is computed once, where the model
            allows.
        checkpointed_layers: of the decoder's first layers so many are recomputed, where
            `gradient_checkpointing` is true; None for all.
        async_save: checkpoints are written beside the steps that follow, from a copy.
        activation_offloading: what recomputed layers keep lies in the host's memory.
        liger: Liger's kernels compute norms, rotary positions and gated layers, where they learn
            the same. The forecasts count on none of what they spare.
        block_attention: is computed in blocks, as products (see `mst.training.block_attention`).
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
    quantization: str = "none"
    optim: str = "adamw_torch"
    offload: str = "none"
    offload_dir: str | None = None
    nnodes: int = 1
    time: TimeForecast | None = None
    alternatives: tuple[Alternative, ...] = ()
    privacy: PrivacyBudget | None = None
    chunked_loss: bool = False
    compiled: bool = False
    heap: str = "tight"
    prefix_sharing: bool = False
    checkpointed_layers: int | None = None
    async_save: bool = False
    activation_offloading: bool = False
    liger: bool = False
    block_attention: bool = False

    @property
    def world_size(self) -> int:
        """Processes in all, one a device."""
        return self.nnodes * len(self.torch_devices)

    @property
    def global_batch(self) -> int:
        """Rows an optimizer step, on all devices."""
        per_device = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return per_device * self.world_size
