"""Showing a plan to a person: what will be done, why, and what memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.inputs import Inputs
from mst.job import Job
from mst.quantities import duration, gib

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from mst.configuration import Configuration
    from mst.longest import LengthLimit, LongestRows
    from mst.memory_trace import TraceEstimate
    from mst.model.facts import ModelFacts
    from mst.plan import Alternative, MemoryForecast, Plan, TimeForecast
    from mst.rundir import RunManifest
    from mst.track_record import Entry

_PARTS = {
    "runtime_bytes": "libraries",
    "weights_bytes": "weights",
    "trainable_bytes": "adapters and casts",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "activations_bytes": "activations",
    "logits_bytes": "logits",
    "buffers_bytes": "buffers",
    "slack_bytes": "slack",
}
_WAY = ("tuner", "strategy", "devices", "batch", "memory", "host", "a row", "trained")


def show_inputs(console: Console, model: ModelFacts, manifest: RunManifest) -> None:
    """Print the model, how each data file was understood, and which of its rows are left out."""
    console.print(
        f"model   {manifest.model}: {model.parameters / 1e6:.1f} M parameters,"
        f" {model.layers} layers, {model.model_type}"
    )
    for each in (*manifest.data, *manifest.val_data):
        columns = ", ".join(each.columns)
        of = f" of {each.selection}" if each.selection else ""
        console.print(
            f"data    {each.path}: {each.rows} rows{of}, {each.kind}, {each.shape} ({columns})"
        )
        for reason in each.skipped:
            console.print(f"        left out: {reason}", markup=False)


def show_plan(console: Console, job: Job) -> None:
    """Print the plan, each choice with its reason, and the memory forecast."""
    from rich.table import Table

    plan = job.plan
    show_inputs(console, job.model, job.manifest)
    console.print(
        f"rows    {plan.train_rows} to train on, {plan.val_rows} held out;"
        f" {plan.total_steps} steps of"
        f" {plan.global_batch} rows"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("choice", "value", "why"):
        table.add_column(heading)
    for reason in plan.reasons:
        table.add_row(reason.choice, reason.value, reason.why)
    console.print(table)
    memory = plan.memory
    available = "" if memory.available_bytes is None else f" of {gib(memory.available_bytes)} free"
    parts = ", ".join(
        f"{words} {gib(getattr(memory, name))}"
        for name, words in _PARTS.items()
        if getattr(memory, name)
    )
    many = " on each device" if len(plan.torch_devices) > 1 else ""
    console.print(
        f"memory  {gib(memory.peak_bytes)} predicted at the peak{available}{many}: {parts}"
    )
    if memory.host_bytes:
        console.print(f"        and {gib(memory.host_bytes)} of the host's memory")
    if plan.time is not None:
        console.print(f"time    {time_text(plan.time)}")
    for warning in plan.warnings:
        console.print(f"note    {warning}")


def time_text(time: TimeForecast) -> str:
    """Return a forecast of time in words, with its uncertainty."""
    low, high = time.total_seconds / time.uncertainty, time.total_seconds * time.uncertainty
    return (
        f"{duration(time.step_seconds)} a step, {duration(time.total_seconds)} in all (between"
        f" {duration(low)} and {duration(high)}; {time.basis})"
    )


def show_alternatives(
    console: Console, looked_at: Sequence[Alternative], plan: Plan | None = None
) -> None:
    """Print every way to train that the planner looked at: memory, time, and why not."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in _WAY:
        table.add_column(heading, no_wrap=True)
    table.add_column("why not")
    for each in looked_at:
        chosen = plan is not None and _is_plan(each.configuration, plan)
        table.add_row(*_way_cells(each), each.why_not or ("chosen" if chosen else ""))
    console.print()
    console.print(table)


def _way_cells(each: Alternative) -> tuple[str, ...]:
    """Return a configuration's cells of a table, under the headings `_WAY`."""
    made = each.configuration
    rows = made.micro_batch * made.accumulation * made.world_size
    seconds = each.step_seconds
    quantized = "" if made.quantization == "none" else f" {made.quantization}"
    moments = "" if made.optim == "adamw_torch" else f" {made.optim}"
    offload = "" if made.offload == "none" else f" {made.offload} on host"
    again = "" if made.checkpointed_layers is None else f" {made.checkpointed_layers}"
    again += " on host" if made.activation_offloading else ""
    return (
        f"{made.tuner}{quantized}{moments}",
        f"{made.strategy}{offload}",
        str(made.world_size),
        f"{made.micro_batch}{f' ckpt{again}' if made.checkpointing else ''}",
        gib(each.peak_bytes),
        gib(each.host_bytes) if each.host_bytes else "",
        "" if seconds is None else duration(seconds / rows),
        f"{each.trained_share:.2%}",
    )


def show_longest(console: Console, inputs: Inputs, found: LongestRows) -> None:
    """Print how long rows may be in each way to train, and what that rests on."""
    from rich.table import Table

    show_inputs(console, inputs.model, inputs.manifest)
    batch = "1 row" if found.micro_batch == 1 else f"{found.micro_batch} rows"
    console.print(
        f"assumed a micro-batch of {batch} of that length, {found.label_share:.0%} of whose tokens"
        " carry loss, as in that row of the data which has the most"
    )
    if found.bound:
        console.print(f"memory  {found.bound}")
    fits = [each for each in found.limits if each.max_length]
    headings = ("max_length", *_WAY[:-1], "ended by")
    rows = [
        (str(each.max_length), *_way_cells(each.at)[:-1], _ended_by(each, found.context))
        for each in fits
    ]
    filled = [n for n in range(len(headings)) if any(row[n] for row in rows)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for n in filled:
        table.add_column(headings[n], no_wrap=headings[n] not in ("tuner", "strategy"))
    for row in rows:
        table.add_row(*(row[n] for n in filled))
    console.print()
    console.print(table)
    console.print()
    for tuner, why in _never(found).items():
        console.print(f"{tuner} does not fit with rows of any length: {why}")
    if never := len(found.limits) - len(fits):
        console.print(f"{never} ways do not fit with rows of any length; --json lists them")
    console.print(f"longest {fits[0].max_length} tokens")


def _ended_by(limit: LengthLimit, context: int | None) -> str:
    from mst.shortfall import LENGTH_STEP

    at_context = context is not None and limit.max_length + LENGTH_STEP > context
    return "context" if at_context else "memory"


def _never(found: LongestRows) -> dict[str, str]:
    """Return the tuners that fit in no way, with what the nearest lacks."""
    fitting = {each.at.configuration.tuner for each in found.limits if each.max_length}
    lacking: dict[str, str] = {}
    for each in found.limits:
        tuner = each.at.configuration.tuner
        if tuner not in fitting:
            lacking.setdefault(tuner, each.at.why_not)
    return lacking


def _is_plan(made: Configuration, plan: Plan) -> bool:
    return (made.tuner, made.strategy, made.offload, made.optim, made.world_size) == (
        plan.tuner, plan.strategy, plan.offload, plan.optim, plan.world_size
    )  # fmt: skip


def show_trace(console: Console, memory: MemoryForecast, traced: TraceEstimate) -> None:
    """Print the second estimate beside the first, both without what no tensor holds."""
    own = memory.peak_bytes - memory.runtime_bytes - memory.slack_bytes - memory.buffers_bytes
    console.print(
        f"trace   {gib(traced.peak_bytes)} of tensors at the peak of a simulated step"
        f" ({duration(traced.seconds)}); the forecast has {gib(own)} of them:"
        f" {own / traced.peak_bytes - 1:+.1%}"
    )


def show_track_record(console: Console, directory: Path, found: Sequence[Entry]) -> None:
    """Print forecast and measurement of each run, and how good the forecasts were."""
    from rich.table import Table

    from mst.track_record import summary

    if not found:
        console.print(f"{directory} holds no run that was measured. Start one: mst train")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    headings = ("run", "tuner", "batch", "forecast", "measured", "error", "a step", "measured")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for each in found:
        measured = each.measured_bytes
        error = "" if not measured else f"{each.forecast_bytes / measured - 1:+.1%}"
        table.add_row(
            each.run,
            each.tuner,
            str(each.micro_batch),
            gib(each.forecast_bytes),
            gib(measured) if measured else "-",
            "out of memory" if each.missed else error,
            duration(each.forecast_seconds) if each.forecast_seconds else "-",
            duration(each.measured_seconds) if each.measured_seconds else "-",
        )
    console.print(table)
    told = summary(found)
    if told.median_error is not None and told.worst_under is not None:
        console.print(
            f"memory  {told.runs} runs: median error {told.median_error:.1%}, at the most"
            f" {told.worst_under:.1%} too low; {told.misses} times memory ran out"
        )
    if told.median_time_ratio is not None:
        console.print(f"time    forecast over measured: {told.median_time_ratio:.2f} (median)")
