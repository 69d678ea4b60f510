"""A second estimate of a step's peak memory: every tensor of a simulated step is counted.

Independent of the closed forms in `mst.memory`: transformers builds the model, PEFT the adapters,
`mst.training` the loss and the optimizer, and torch runs all of it on tensors without data
(FakeTensorMode). Works from config.json alone and needs no device.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mst.configuration import Configuration
from mst.errors import ModelError, PlanError
from mst.launch import worker_environment
from mst.memory import StepShape
from mst.serial import from_json, to_json

# SmolLM2-135M takes 20 s on one core of an AMD EPYC (Zen 5), most of it for imports.
TRACE_SECONDS = 600.0
KERNELS = ("fused", "math")


@dataclass(frozen=True)
class TraceRequest:
    """What the trace's process is told.

    Attributes:
        model_directory: holds config.json; no weights are read.
        configuration: how it is trained.
        step: the largest micro-batch.
        on_host: the device is the CPU; others have autocast and AdamW of their own.
        attention_kernel: of `scaled_dot_product_attention`: "fused" or "math".
    """

    model_directory: str
    configuration: Configuration
    step: StepShape
    on_host: bool
    attention_kernel: str = "fused"


@dataclass(frozen=True)
class TraceEstimate:
    """The live bytes of one device in each phase of a step, allocator rounding included.

    Attributes:
        weights_bytes: base weights, adapters and buffers.
        steady_bytes: between two steps: the above and the optimizer's states.
        forward_bytes: peak until the loss is there.
        late_bytes: peak of the backward pass of loss, head and last layer.
        early_bytes: peak of the backward pass of the first layer and the embedding.
        optimizer_bytes: peak of clipping and the optimizer's step.
        layers_traced: depths that were run; the rest is a straight line through them, one for each
            kind where only some layers are recomputed.
        seconds: that the trace took.
    """

    weights_bytes: int
    steady_bytes: int
    forward_bytes: int
    late_bytes: int
    early_bytes: int
    optimizer_bytes: int
    layers_traced: tuple[int, ...]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The largest of all phases; libraries, contexts and workspaces are not in it."""
        return max(self.forward_bytes, self.late_bytes, self.early_bytes, self.optimizer_bytes)


def why_not(configuration: Configuration) -> str:
    """Return why a configuration can't be traced, or ""."""
    if configuration.strategy.startswith("zero"):
        return "DeepSpeed's partitions exist only among running processes"
    if configuration.quantization == "int8":
        return "bitsandbytes' 8-bit layers don't run on tensors without data"
    if configuration.activation_offloading:
        return "tensors without data have no host to be copied to"
    if configuration.optim != "adamw_torch":
        return "bitsandbytes' 8-bit optimizers don't run on tensors without data"
    return ""


def trace(
    model_directory: Path,
    configuration: Configuration,
    step: StepShape,
    environ: Mapping[str, str],
    on_host: bool,
    attention_kernel: str = "fused",
) -> TraceEstimate:
    """Trace a training step of the model in `model_directory`, in a process of its own.

    Args:
        model_directory: holds config.json; weights are not read.
        configuration: how it is trained; one device of it is traced.
        step: the largest micro-batch.
        environ: the user's; libraries are kept offline.
        on_host: the device is the CPU.
        attention_kernel: "fused", or "math" on devices whose torch has no fused kernel.

    Raises:
        PlanError: the configuration can't be traced; says why.
        ModelError: transformers can't build the model, or its step doesn't run without data.
    """
    if reason := why_not(configuration):
        raise PlanError(
            f"--trace does not cover {configuration.tuner} with {configuration.strategy},"
            f" {configuration.quantization} weights and {configuration.optim}: {reason}."
            " The forecast above stands alone; leave --trace out."
        )
    asked = TraceRequest(str(model_directory), configuration, step, on_host, attention_kernel)
    done = subprocess.run(
        [sys.executable, "-m", "mst.memory_trace_worker"],
        input=json.dumps(to_json(asked)),
        env=worker_environment(environ, {"OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=TRACE_SECONDS,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        errors = [each.strip() for each in done.stderr.splitlines() if each.strip()]
        cause = errors[-1][:300] if errors else f"exit code {done.returncode}"
        raise ModelError(
            f"a step of the model in {model_directory} can't be traced: {cause}."
            " The forecast above stands alone; leave --trace out."
        )
    return from_json(TraceEstimate, json.loads(lines[-1]))
