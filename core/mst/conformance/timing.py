"""Checks of speed: a product and a copy are measured and held against what is declared."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mst.conformance.activation import torch_device
from mst.conformance.findings import Context, Finding, failed, passed, verdict
from mst.conformance.subject import devices

if TYPE_CHECKING:
    import torch

# A measurement shorter than this is mostly launch and clock; one much longer proves no more.
ENOUGH_SECONDS = 0.05
BUDGET_SECONDS = 5.0
# A busy machine may delay the reader itself by some tens of milliseconds.
LATE_SECONDS = 0.1
LARGEST_SIDE = 8192
LARGEST_COPY_BYTES = 2**29
# Clocks boost, so a chip may pass its data sheet by a little.
ABOVE_PEAK = 1.05
BELOW_PEAK = 0.01


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(device: torch.device, call: Callable[[], object]) -> float:
    """Return how long one call takes: repeated until it is long enough, the best of three."""
    call()
    synchronize(device)
    times: list[float] = []
    deadline, repeat = time.perf_counter() + BUDGET_SECONDS, 1
    while len(times) < 3 and time.perf_counter() < deadline:
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        synchronize(device)
        taken = time.perf_counter() - began
        if taken < ENOUGH_SECONDS:
            # Also after times were kept: only full-length measurements are compared.
            repeat *= 2
            continue
        times.append(taken / repeat)
    return min(times, default=BUDGET_SECONDS)


def product_tflops(device: torch.device, dtype: torch.dtype, memory_bytes: int) -> float:
    """Return the dense TFLOPS of the largest square product that is quick enough to time."""
    import torch

    side = 256
    while True:
        left = torch.ones(side, side, dtype=dtype, device=device)
        began = time.perf_counter()
        torch.mm(left, left)
        synchronize(device)
        took = time.perf_counter() - began
        grown = 3 * (2 * side) ** 2 * dtype.itemsize
        if took > ENOUGH_SECONDS or side >= LARGEST_SIDE or grown > memory_bytes // 4:
            break
        side *= 2
    return 2 * side**3 / seconds_of(device, lambda: torch.mm(left, left)) / 1e12


def product_speed(context: Context) -> Finding:
    """Measure a product in each declared dtype, and compare it with the declared peak."""
    import torch

    device, facts = torch_device(context.subject), devices(context.subject)[0]
    memory = facts.memory_free_bytes or 2**30
    measured, faults = {}, []
    for name in facts.dtypes:
        if not getattr(torch, name).is_floating_point or "float8" in name:
            continue
        context.at(name)
        measured[name] = product_tflops(device, getattr(torch, name), memory)
        peak = facts.peak_tflops.get(name)
        faults += _faults(f"{name} product", measured[name], peak, "TFLOPS", "peak_tflops")
    told = ", ".join(
        f"{name} {value:.3g} TFLOPS"
        + (f" of {facts.peak_tflops[name]:g}" if name in facts.peak_tflops else ", peak unknown")
        for name, value in measured.items()
    )
    return verdict(
        faults,
        "correct peak_tflops, or leave it out; make synchronize() wait",
        told,
        tflops=measured,
        declared_tflops=dict(facts.peak_tflops),
    )


def copy_speed(context: Context) -> Finding:
    """Measure copies on the device and to it, and compare them with the declared bandwidth."""
    import torch

    device, facts = torch_device(context.subject), devices(context.subject)[0]
    # Large enough not to fit a cache, small enough for a chip that is simulated in host memory.
    size = min(LARGEST_COPY_BYTES, (facts.memory_free_bytes or 2**31) // 32)
    # Ones, because pages of zeros may not be memory yet.
    host = torch.ones(size, dtype=torch.uint8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Read once and written once.
    rate = 2 * size / seconds_of(device, lambda: target.copy_(source))
    to_device = size / seconds_of(device, lambda: source.copy_(host))
    declared = facts.bandwidth_bytes_per_second
    faults = _faults(
        "copy", rate / 1e9, declared and declared / 1e9, "GB/s", "bandwidth_bytes_per_second"
    )
    of = f" of {declared / 1e9:g}" if declared else ", bandwidth unknown"
    return verdict(
        faults,
        "correct bandwidth_bytes_per_second, or leave it out; make synchronize() wait",
        f"{rate / 1e9:.3g} GB/s on the device{of}; {to_device / 1e9:.3g} GB/s from the host",
        copy_bytes_per_second=rate,
        host_to_device_bytes_per_second=to_device,
        declared_bytes_per_second=declared,
    )


def _faults(what: str, measured: float, declared: float | None, unit: str, field: str) -> list[str]:
    if declared is None:
        return []
    figures = f"{measured:.3g} {unit} measured, {declared:g} declared"
    if measured > declared * ABOVE_PEAK:
        return [
            f"{what} is faster than its declared peak ({figures}): synchronize() does not wait,"
            f" or {field} is wrong"
        ]
    if measured < declared * BELOW_PEAK:
        return [f"{what} reaches less than 1 % of {field} ({figures}): that is not credible"]
    return []


def synchronize_waits(context: Context) -> Finding:
    """Check that after synchronize() the result is there, and not only asked for."""
    import torch

    device = torch_device(context.subject)
    left = torch.full((512, 512), 1 / 512, device=device)
    began = time.perf_counter()
    product = left
    while time.perf_counter() - began < ENOUGH_SECONDS:
        product = product @ left
    synchronize(device)
    waited = time.perf_counter()
    value = float(product[0, 0].cpu())
    late = time.perf_counter() - waited
    if late > LATE_SECONDS:
        return failed(
            f"a value came {late * 1000:.0f} ms after synchronize() had returned",
            "let torch.accelerator.synchronize() wait for every stream of the device",
        )
    return passed(f"a value comes {late * 1000:.1f} ms after synchronize()", value=value)
