"""What a device does wrong while it trains, told apart and put into words."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mst.errors import DeviceLost, OutOfMemory, TrainingError
from mst.quantities import gib
from mst.training.device_memory import trim_heap

if TYPE_CHECKING:
    import torch

    from mst.plan import Plan
    from mst.request import TrainRequest


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device, or the host, had no memory left."""
    import torch

    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )


def answers(device: torch.device) -> bool:
    """Return whether the device still computes."""
    import torch

    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def free_memory(device: torch.device) -> None:
    """Give back what is no longer used, on the device and in Python's cycles."""
    import torch

    gc.collect()
    if device.type == "cpu":
        trim_heap()
    else:
        torch.accelerator.empty_cache()


@contextlib.contextmanager
def named(device: torch.device, doing: str) -> Iterator[None]:
    """Turn a fault of the device into an error that names it; bugs stay bugs.

    The text of torch's own errors is left out, but for operators' names: it might quote a value.

    Args:
        device: on which the work is done.
        doing: the work, as in "while loading the model".

    Raises:
        DeviceLost: it no longer computes.
        OutOfMemory: it has no memory left.
        TrainingError: it lacks an operator.
    """
    try:
        yield
    except NotImplementedError as error:
        operator = re.search(r"'(\w+::[\w.]+)'", str(error))
        if operator is None or device.type == "cpu":
            raise
        raise TrainingError(
            f"{device} has no kernel for {operator[1]}, which was needed {doing}."
            f" `mst backend check` lists what its backend lacks; --device cpu trains without it."
        ) from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"{device} ran out of memory {doing} ({memory_state(device)}). End other processes"
                " on it, or choose a smaller model, --tuner lora, or another --device.",
                peak_bytes=peak(device),
            ) from None
        if device.type == "cpu" or answers(device):
            raise
        raise DeviceLost(
            f"{device} stopped answering {doing}. What was saved before is whole. `mst doctor`"
            " shows what its backend reports; reset or replace the device, then go on with the"
            " same command and --resume (--device may name another one)."
        ) from None


def peak(device: torch.device) -> int | None:
    """Return the most bytes that this process had in use on the device; None when it can't say."""
    import torch

    if device.type == "cpu":
        return None
    try:
        return int(torch.accelerator.max_memory_allocated(device))
    except (RuntimeError, NotImplementedError, AttributeError):
        return None


def memory_state(device: torch.device) -> str:
    """Return how full the device was at the most, for a message."""
    import torch

    used = peak(device)
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
        if used is not None:
            total = torch.accelerator.get_memory_info(device)[1]
            return f"{gib(used)} of {gib(total)} in use by this process at the peak"
    return "how full it was, it does not say"


def too_large(
    device: torch.device, step: int, micro_batch: int, plan: Plan, request: TrainRequest
) -> OutOfMemory:
    """Return the error of a step that did not fit: what was tried, and what to lower.

    Args:
        device: that ran out of memory.
        step: number of the step, from 1.
        micro_batch: rows of the micro-batches that were tried.
        plan: of the run.
        request: of the run.
    """
    ways = []
    if micro_batch > 1:
        smaller = micro_batch // 2
        factor = -(-plan.per_device_train_batch_size // smaller)
        accumulation = plan.gradient_accumulation_steps * factor
        ways.append(
            f"--per-device-train-batch-size {smaller} --gradient-accumulation-steps {accumulation}"
            " (the same global batch)"
        )
        if request.on_oom != "shrink":
            ways.append("--on-oom shrink, which does that by itself and goes on from the step")
    if not plan.gradient_checkpointing or plan.checkpointed_layers is not None:
        ways.append("--gradient-checkpointing on")
    elif device.type != "cpu" and plan.privacy is None and not plan.activation_offloading:
        ways.append("--activation-offloading on")
    ways.append(f"a --max-length below {plan.max_length}")
    if plan.tuner == "full":
        ways.append("--tuner lora")
    return OutOfMemory(
        f"{device} ran out of memory in step {step} with micro-batches of {micro_batch} rows"
        f" ({memory_state(device)}); the plan had expected {gib(plan.memory.peak_bytes)}."
        f" Try {'; or '.join(ways)}."
        + (" What was trained before this step is saved." if step > 1 else ""),
        step,
        micro_batch,
        peak(device),
    )
