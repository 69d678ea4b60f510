"""Showing a plan to a person: what will be done, why, and what memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.job import Job

if TYPE_CHECKING:
    from rich.console import Console


def gib(count: float) -> str:
    """Return bytes as GiB, or MiB when small."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def show_data(console: Console, job: Job) -> None:
    """Print how each data file was understood."""
    for each in (*job.manifest.data, *job.manifest.val_data):
        columns = ", ".join(each.columns)
        console.print(
            f"data    {each.path}: {each.rows} rows, {each.kind}, {each.shape} ({columns})"
        )


def show_plan(console: Console, job: Job) -> None:
    """Print the plan, each choice with its reason, and the memory forecast."""
    from rich.table import Table

    plan = job.plan
    console.print(
        f"model   {job.source.name}: {job.model.parameters / 1e6:.1f} M parameters,"
        f" {job.model.layers} layers, {job.model.model_type}"
    )
    show_data(console, job)
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
    console.print(
        f"memory  {gib(memory.peak_bytes)} predicted at the peak{available}: libraries"
        f" {gib(memory.runtime_bytes)}, weights {gib(memory.weights_bytes)}, adapters and casts"
        f" {gib(memory.trainable_bytes)}, gradients {gib(memory.gradients_bytes)}, optimizer"
        f" {gib(memory.optimizer_bytes)}, activations {gib(memory.activations_bytes)}, logits"
        f" {gib(memory.logits_bytes)}"
    )
    for warning in plan.warnings:
        console.print(f"note    {warning}")
