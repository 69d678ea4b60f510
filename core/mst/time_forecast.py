"""How long an optimizer step takes: from peaks, and efficiencies that were measured or published.

docs/time.md has the formulas, the table and what each figure was checked against.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from mst.catalogue import find
from mst.configuration import Configuration
from mst.facts import DeviceFacts
from mst.model.facts import ModelFacts
from mst.nearest_peak import Peak, peak_of
from mst.plan import TimeForecast
from mst.step_work import StepWork, model_work, step_work


@dataclass(frozen=True)
class Efficiency:
    """How much of its peaks a kind of device reaches in our loop.

    Attributes:
        products: of the peak, in matrix products.
        attention: of the peak, in attention by torch's kernels.
        block_attention: of the peak, in attention in blocks; None where there is none.
        elementwise_passes: see `step_work`.
        bandwidth: of the memory's, in everything that is no product.
        unpacking: of the memory's, where quantized weights are unpacked.
        launch_seconds: to start a kernel.
        asynchronous: the host starts kernels while the device computes.
        uncertainty: factor by which a forecast may be wrong either way.
        source: where all this comes from.
    """

    products: float
    attention: float
    block_attention: float | None
    elementwise_passes: float
    bandwidth: float
    unpacking: float
    launch_seconds: float
    asynchronous: bool
    uncertainty: float
    source: str


@dataclass(frozen=True)
class Link:
    """How a device reaches its peers.

    Attributes:
        bytes_per_second: in one direction, as collectives reach it.
        source: where the figure comes from.
        known: it was looked up for this link, not assumed.
    """

    bytes_per_second: float
    source: str
    known: bool


ACCELERATOR = Efficiency(
    products=0.65,
    attention=0.65,
    block_attention=None,
    elementwise_passes=6.0,
    bandwidth=0.75,
    unpacking=0.25,
    launch_seconds=20e-6,
    asynchronous=True,
    uncertainty=1.5,
    source="Qwen README, profiling on A100-SXM4-80GB",
)
# Attention in blocks reached 0.26 to 0.52 of the rate of one product of 2,048 squared in bfloat16;
# in float32 that of torch's own kernel for one row, 0.39 to 0.62 (a Zen 4, docs/time.md).
CPU = Efficiency(
    products=0.48,
    attention=0.15,
    block_attention=0.30,
    elementwise_passes=9.0,
    bandwidth=0.8,
    unpacking=0.25,
    launch_seconds=6e-6,
    asynchronous=False,
    uncertainty=1.5,
    source="benchmarks/time_forecast.py, bfloat16 on an AMD EPYC (Zen 5)",
)
CPU_FLOAT32 = replace(
    CPU,
    products=0.40,
    attention=0.26,
    block_attention=0.26,
    source="benchmarks/time_forecast.py, float32 on an AMD EPYC (Zen 5)",
)
# Where a product reached 1,428 GFLOPS, a fifth of the declared peak of its two cores, the rest is
# taken to be as on other CPUs; attention in blocks, which is products, in proportion to them.
AMX = replace(
    CPU,
    products=0.10,
    block_attention=0.06,
    uncertainty=2.5,
    source="one product measured on two AMX cores; the rest as on an AMD EPYC (Zen 5)",
)
# A core's share of the memory's bandwidth where it is not known, up to a socket's worth.
CPU_CORE_BANDWIDTH = 20e9
CPU_BANDWIDTH = 200e9
# Where a chip's bandwidth is not known: an A100 has a byte a second for 153 operations.
FLOP_PER_BYTE = 150
# Of a link's rate in one direction, what collectives reach.
LINK_SHARE = 0.75
# One NVLink of a GA102 has 14.0625 GB/s in each direction, those of data centre chips have more
# (NVIDIA GA102 white paper V2, page 13).
NVLINK_BYTES_PER_SECOND = 14.0625e9
# PCI Express 3.0 with 16 lanes: 15.75 GB/s in each direction (PCI-SIG, PCIe 3.0 FAQ).
PCIE_BYTES_PER_SECOND = 15.75e9
# Processes on one host pass data through its memory over loopback TCP (gloo).
LOOPBACK_BYTES_PER_SECOND = 1e9
# Machines: 10 Gbit/s Ethernet, the least that makes sense for this.
NETWORK_BYTES_PER_SECOND = 1.25e9
# The host's AdamW reads four and writes three float32 values of a weight; a server's memory moves
# some 100 GB/s.
HOST_SECONDS_PER_WEIGHT = 7 * 4 / 100e9
# Where this share of a step rests on an assumption, the forecast is less certain; and so where
# weights are unpacked, as published slow-downs lie between 1.05 and 2.0 (docs/time.md).
ASSUMED_SHARE = 0.2
ASSUMED_UNCERTAINTY = 1.3

Timer = Callable[[Configuration, float, float, float], TimeForecast | None]


def efficiency(device: DeviceFacts, dtype: str) -> Efficiency:
    """Return the row of the table for a device that computes in `dtype`."""
    if device.backend != "cpu":
        return ACCELERATOR
    if dtype == "float32":
        return CPU_FLOAT32
    return AMX if "amx_bf16" in device.features else CPU


def link_of(device: DeviceFacts, nnodes: int = 1) -> Link:
    """Return how fast a device reaches its peers; the slowest of its links counts.

    Args:
        device: with `links` as its driver names them.
        nnodes: machines; the network between them is assumed to be 10 Gbit/s.
    """
    if nnodes > 1:
        return Link(NETWORK_BYTES_PER_SECOND, "assumed: 10 Gbit/s between machines", False)
    if device.backend == "cpu":
        return Link(LOOPBACK_BYTES_PER_SECOND, "assumed: loopback between processes", False)
    kinds = set(device.links.values())
    if kinds and all(re.fullmatch(r"NV\d+|NVLink", kind) for kind in kinds):
        chip = find(device.backend, device.name, device.memory_total_bytes)
        if chip is not None and chip.link_bytes_per_second is not None:
            figure = chip.link_bytes_per_second
            # The catalogue gives both directions together.
            return Link(LINK_SHARE * figure.value / 2, f"table: {figure.source}", True)
        lanes = [int(kind[2:]) for kind in kinds if kind != "NVLink"]
        if lanes:
            rate = LINK_SHARE * NVLINK_BYTES_PER_SECOND * min(lanes)
            return Link(rate, f"table: GA102 white paper, {min(lanes)} NVLinks", True)
    return Link(LINK_SHARE * PCIE_BYTES_PER_SECOND, "assumed: PCIe 3.0 x16", False)


def step_timer(
    model: ModelFacts,
    target_modules: tuple[str, ...],
    device: DeviceFacts,
    link: Link | None = None,
    nnodes: int = 1,
) -> Timer:
    """Return a function from a configuration and a step's sizes to its time.

    What the model costs is summed up here, once, so that hundreds of configurations can be asked
    for. The function takes (configuration, tokens, label tokens, tokens of an average row): those
    of one optimizer step on all devices, padding included. It returns None where the device's
    peak in the configuration's dtype is unknown; its `total_seconds` are those of the one step.

    Args:
        model: its shape.
        target_modules: layers that get an adapter.
        device: the slowest of those that train.
        link: between them; default what `link_of` says.
        nnodes: machines that they are on.

    Raises:
        ModelError: `target_modules` match nothing.
    """
    work = model_work(model, target_modules)
    reach = link or link_of(device, nnodes)

    def timer(
        made: Configuration, tokens: float, label_tokens: float, mean_row_tokens: float
    ) -> TimeForecast | None:
        peak = peak_of(device, made.compute_dtype)
        if peak is None:
            return None
        # Ranks on a CPU share its cores.
        sharers = made.world_size // nnodes if device.backend == "cpu" else 1
        row = efficiency(device, made.compute_dtype)
        if made.block_attention and row.block_attention is not None:
            row = replace(row, attention=row.block_attention)
        asked = step_work(work, made, tokens, label_tokens, mean_row_tokens, row.elementwise_passes)
        return _forecast(asked, row, device, peak, sharers, reach)

    return timer


def step_time(
    model: ModelFacts,
    configuration: Configuration,
    tokens: float,
    label_tokens: float,
    mean_row_tokens: float,
    device: DeviceFacts,
    link: Link | None = None,
    nnodes: int = 1,
) -> TimeForecast | None:
    """Return how long one optimizer step takes; None when the device's peak is unknown.

    Args: as `step_timer` and its function, which is quicker for many configurations.
    """
    timer = step_timer(model, configuration.target_modules, device, link, nnodes)
    return timer(configuration, tokens, label_tokens, mean_row_tokens)


def over_steps(step: TimeForecast, steps: int) -> TimeForecast:
    """Return the forecast of a run of `steps` such steps."""
    return replace(step, total_seconds=step.step_seconds * steps)


def _bandwidth(device: DeviceFacts, peak: float, sharers: int) -> tuple[float, str]:
    """Return bytes a second of the device's memory for one rank, and a note where assumed."""
    if device.bandwidth_bytes_per_second is not None:
        return device.bandwidth_bytes_per_second / sharers, ""
    if device.backend == "cpu":
        rate = min(CPU_BANDWIDTH, CPU_CORE_BANDWIDTH * (device.compute_units or 1))
        return rate / sharers, ""
    return peak / FLOP_PER_BYTE, "; memory bandwidth assumed"


def _forecast(
    asked: StepWork,
    row: Efficiency,
    device: DeviceFacts,
    most: Peak,
    sharers: int,
    link: Link,
) -> TimeForecast:
    peak = most.flop_per_second / sharers
    bandwidth, note = _bandwidth(device, peak, sharers)
    computing = (asked.flop / row.products + asked.attention_flop / row.attention) / peak
    moving = asked.traffic_bytes / (bandwidth * row.bandwidth)
    unpacking = asked.unpacked_bytes / (bandwidth * row.unpacking)
    launching = asked.launches * row.launch_seconds
    kernels = computing + moving + unpacking
    on_device = max(kernels, launching) if row.asynchronous else kernels + launching
    sending = asked.sent_bytes / link.bytes_per_second
    bus = LINK_SHARE * PCIE_BYTES_PER_SECOND
    hosting = asked.offloaded_bytes / bus + asked.host_updates * HOST_SECONDS_PER_WEIGHT
    seconds = on_device + sending + hosting
    assumed = hosting + (0.0 if link.known else sending) + (moving + unpacking if note else 0.0)
    uncertainty = row.uncertainty * most.uncertainty
    if assumed > ASSUMED_SHARE * seconds or unpacking:
        uncertainty *= ASSUMED_UNCERTAINTY
    if most.source:
        note += f"; peak {most.source}"
    if asked.sent_bytes:
        note += f"; link: {link.source}"
    return TimeForecast(
        step_seconds=seconds,
        total_seconds=seconds,
        uncertainty=round(uncertainty, 2),
        basis=f"table: {row.source}{note}",
    )
