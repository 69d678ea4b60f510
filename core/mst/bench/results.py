"""What was measured of a cell: its runs, exports, servers, and where that was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mst.bench.cells import Cell

DONE, MEMORY, TOO_LARGE, TIMEOUT = "done", "out of memory", "does not fit", "timeout"
ABSENT, REFUSED, FAILED, LOST, FORECAST = "absent", "refused", "failed", "lost", "forecast"
# What says nothing about the device: such a cell was not measured at all.
BROKEN = (TIMEOUT, FAILED, LOST)


@dataclass(frozen=True)
class Repeat:
    """One run of a cell.

    Attributes:
        step_seconds: of each measured step.
        tokens: of the measured steps.
        loss: of the last step.
        eval_loss: on the rows held out, after it.
        peak_memory_bytes: of the process on a CPU, else of the allocator.
        wall_seconds: of the whole command, start and saving included.
        energy_joules: of the device over the measured steps; None where nobody counts it.
        temperature_celsius: the highest meanwhile.
        throttled: what slowed the device meanwhile, in the vendor's words.
        load_before: mean number of running processes in the minute before.
        busy_before: share of the cores that others used just before.
        losses: of each step, those of the warm-up too.
    """

    step_seconds: tuple[float, ...]
    tokens: int
    loss: float
    eval_loss: float | None
    peak_memory_bytes: int
    wall_seconds: float
    energy_joules: float | None = None
    temperature_celsius: float | None = None
    throttled: tuple[str, ...] = ()
    load_before: float = 0.0
    busy_before: float = 0.0
    losses: tuple[float, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Of the measured steps."""
        return self.tokens / max(sum(self.step_seconds), 1e-9)


@dataclass(frozen=True)
class Setting:
    """What the plan made of a cell; attributes as `mst.plan.Plan`."""

    tuner: str
    quantization: str
    strategy: str
    world_size: int
    compute_dtype: str
    weights_dtype: str
    attention: str
    optim: str
    micro_batch: int
    accumulation: int
    checkpointing: bool
    compiled: bool
    threads: int


@dataclass(frozen=True)
class Forecast:
    """What the planner said before the run.

    Attributes:
        memory_bytes: at the peak, as `Repeat.peak_memory_bytes` counts it.
        step_seconds: of one step; None where the device's speed is not known.
        tokens_per_second: likewise; None where the rows of a step are not known.
        uncertainty: factor by which the time may be wrong either way.
        basis: where the speed comes from.
    """

    memory_bytes: int
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    uncertainty: float | None = None
    basis: str = ""


@dataclass(frozen=True)
class Peak:
    """What one device multiplies in the cell's dtype, in 10^12 operations a second.

    Attributes:
        catalogue_tflops: its declared peak; None where that is not known.
        source: of it, or why it is not known.
        measured_tflops: of the largest square product, measured before the cell.
        reason: why that was not measured.
    """

    catalogue_tflops: float | None = None
    source: str = ""
    measured_tflops: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Exported:
    """One export of a cell's result.

    Attributes:
        format: of the export.
        status: "passed" or "failed" by the gate, or "error".
        reason: why it has failed.
        seconds: of the command: merging, writing and comparing.
        disk_bytes: of the artefact.
        perplexity_ratio: over the trained model's.
        mean_kl: divergence from it, in nats.
        agreement: share of positions with the same likeliest token.
    """

    format: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    disk_bytes: int = 0
    perplexity_ratio: float | None = None
    mean_kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Served:
    """One load of a server of a cell's result.

    Attributes:
        target: "run", or the format of the export that was served.
        streams: that asked at once.
        reason: why there are no figures, or what is amiss with them.
        requests: that were made.
        lost: of them, those without a whole answer.
        answer_tokens: of the others.
        tokens_per_second: answer tokens of all streams together.
        first_token_seconds: median wait for an answer's first token.
        first_token_p95_seconds: which 95 % of them waited at most.
    """

    target: str
    streams: int
    reason: str = ""
    requests: int = 0
    lost: int = 0
    answer_tokens: int = 0
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    first_token_p95_seconds: float | None = None


@dataclass(frozen=True)
class Machine:
    """Where a cell was measured.

    Attributes:
        node: the machine's name.
        platform: system and kernel.
        device: as `--device` names it.
        chip: the vendor's name of it.
        driver: its version, "" where unknown.
        memory_bytes: of the device.
        clock_offset_seconds: by how much its clock was ahead of the machine that asked; None where
            that was the same one.
    """

    node: str
    platform: str
    device: str
    chip: str
    driver: str = ""
    memory_bytes: int | None = None
    clock_offset_seconds: float | None = None


@dataclass(frozen=True)
class Measured:
    """One cell, and what came of it.

    Attributes:
        id: of the cell.
        cell: what was asked.
        status: "done", "out of memory", "does not fit" (said the plan), "timeout", "absent" (no
            such device), "refused", "failed", "lost" (the machine was) or "forecast".
        reason: why it isn't done; holds no row.
        machine: where; None where it was nowhere.
        began, ended: UTC, ISO 8601, by the clock of the machine that asked.
        repeats: that were measured.
        setting: what the plan chose.
        forecast: what it expected.
        peak: of one device.
        flop_per_token: of products with weights, forward and back, nothing computed twice.
        energy_reason: why the energy is not known.
        exported: in the order of the formats.
        served: in the order of targets and streams.
        versions: of Python and the libraries; of a peer's environment where a peer trained.
        mst_version: that measured.
        commit: of the program, "" where nobody can say.
        jail: the layer that the runs were in.
        notes: what a reader should know.
        loss_difference: of a peer: by how much a step's loss was off mst's, at the most; None
            where mst's row is not done.
    """

    id: str
    cell: Cell
    status: str
    reason: str = ""
    machine: Machine | None = None
    began: str = ""
    ended: str = ""
    repeats: tuple[Repeat, ...] = ()
    setting: Setting | None = None
    forecast: Forecast | None = None
    peak: Peak = field(default_factory=Peak)
    flop_per_token: float | None = None
    energy_reason: str = ""
    exported: tuple[Exported, ...] = ()
    served: tuple[Served, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    mst_version: str = ""
    commit: str = ""
    jail: str = ""
    notes: tuple[str, ...] = ()
    loss_difference: float | None = None


@dataclass(frozen=True)
class Results:
    """All that a bench measured.

    Attributes:
        name: of the matrix.
        created: UTC, ISO 8601.
        cells: in the order of the matrix; forecasts come last.
        notes: what a reader of all of them should know.
    """

    name: str
    created: str
    cells: tuple[Measured, ...]
    notes: tuple[str, ...] = ()


def place_of(each: Measured) -> tuple[str, ...]:
    """Return what tells one measurement from another: the cell, the chip, the machine."""
    machine = each.machine
    where = ("", "") if machine is None else (machine.chip, machine.node)
    return (each.id, *where, FORECAST if each.status == FORECAST else "")


def with_notes(each: Measured, *notes: str) -> Measured:
    """Return a cell with further notes."""
    return replace(each, notes=(*each.notes, *(one for one in notes if one)))
