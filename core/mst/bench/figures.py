"""Figures of a cell, from what its runs left behind: medians, spread, MFU, energy and cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mst import rundir
from mst.bench.cells import Cell
from mst.bench.results import Forecast, Measured, Repeat, Setting
from mst.model.facts import ModelFacts, read_facts
from mst.plan import Plan
from mst.request import TrainRequest
from mst.retry import configuration_of
from mst.rundir import RunManifest
from mst.step_work import model_work, step_work

_JOULES_A_KWH = 3.6e6
_MILLION = 1e6
# The share of the machine's cores that others may use before times are doubted.
BUSY = 0.1
# Of a block: whole rows rarely fill it to the last token.
_FULL = 0.75


@dataclass(frozen=True)
class Spread:
    """The middle of several values, and the ends."""

    median: float
    low: float
    high: float
    count: int

    @property
    def relative(self) -> float:
        """From the lowest to the highest, over the median; 0 where there is one value."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Prices:
    """What the user pays.

    Attributes:
        hour: of a device, by a part of its chip's name or by its backend; the longest part wins.
        kwh: of electricity.
        currency: as it is shown.
    """

    hour: Mapping[str, float]
    kwh: float | None = None
    currency: str = ""


def spread(values: Sequence[float]) -> Spread | None:
    """Return the median and the ends of values; None of none."""
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def over_repeats(each: Measured, value: Callable[[Repeat], float | None]) -> Spread | None:
    """Return a figure's spread over a cell's repeats, those without it left out."""
    found = [value(one) for one in each.repeats]
    return spread([one for one in found if one is not None])


def tokens_per_second(each: Measured) -> Spread | None:
    """Return the tokens a second of a cell, of all its devices together."""
    return over_repeats(each, lambda one: one.tokens_per_second)


def step_seconds(each: Measured) -> Spread | None:
    """Return the seconds of a cell's steps, over all steps of all repeats."""
    return spread([one for repeat in each.repeats for one in repeat.step_seconds])


def peak_memory(each: Measured) -> Spread | None:
    """Return the peak memory of a cell in bytes."""
    return over_repeats(each, lambda one: one.peak_memory_bytes)


def joules_per_token(each: Measured) -> Spread | None:
    """Return the energy of a trained token; None where nobody counts it."""
    return over_repeats(
        each, lambda one: None if one.energy_joules is None else one.energy_joules / one.tokens
    )


def busy(each: Measured) -> bool:
    """Return whether others used so much of the machine that a reader should know of it."""
    return any(one.busy_before > BUSY for one in each.repeats)


def mfu(each: Measured, tflops: float | None) -> float | None:
    """Return which share of a peak the products with weights reached.

    Args:
        each: the cell.
        tflops: of one device: the declared one, or the measured one.

    Source: Chowdhery et al. 2022, "PaLM", appendix B; attention, which it counts too, is left out.
    """
    speed = tokens_per_second(each)
    if tflops is None or each.flop_per_token is None or speed is None or each.setting is None:
        return None
    return speed.median * each.flop_per_token / (tflops * 1e12 * each.setting.world_size)


def million_tokens_kwh(each: Measured) -> float | None:
    """Return the kilowatt-hours of a million trained tokens."""
    joules = joules_per_token(each)
    return None if joules is None else joules.median * _MILLION / _JOULES_A_KWH


def million_tokens_cost(each: Measured, prices: Prices) -> float | None:
    """Return what a million trained tokens cost: hours of the devices, and their electricity.

    None where the user gave no price that fits the chip, or no speed is known.
    """
    hour = price_of(each, prices)
    speed = tokens_per_second(each)
    rate = speed.median if speed else each.forecast.tokens_per_second if each.forecast else None
    if hour is None or not rate:
        return None
    devices = each.setting.world_size if each.setting else each.cell.devices
    cost = hour * devices * _MILLION / rate / 3600
    energy = million_tokens_kwh(each)
    return cost + (energy * prices.kwh if energy is not None and prices.kwh is not None else 0.0)


def price_of(each: Measured, prices: Prices) -> float | None:
    """Return the price of an hour of one of a cell's devices."""
    if each.machine is None:
        return None
    names = (each.machine.chip.lower(), each.machine.device.partition(":")[0].lower())
    fitting = [part for part in prices.hour if part.lower() in names[0] or part.lower() == names[1]]
    return prices.hour[max(fitting, key=len)] if fitting else None


def repeat_of(run: Path, warm_up: int, wall_seconds: float) -> Repeat:
    """Return the figures of a finished run.

    Args:
        run: its directory.
        warm_up: steps at its beginning that are not measured.
        wall_seconds: of its command.

    Raises:
        RunError: the directory is damaged.
    """
    results = rundir.read_manifest(run).results
    steps = [each for each in rundir.read_metrics(run) if "loss" in each and "tokens" in each]
    tokens = [int(each["tokens"]) for each in steps]
    own = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    seconds = [count / each["tokens_per_second"] for count, each in zip(own, steps, strict=True)]
    return Repeat(
        step_seconds=tuple(round(each, 6) for each in seconds[warm_up:]),
        tokens=sum(own[warm_up:]),
        loss=steps[-1]["loss"],
        eval_loss=results.get("last_eval_loss"),
        peak_memory_bytes=int(results["peak_memory_bytes"]),
        wall_seconds=round(wall_seconds, 3),
        losses=tuple(each["loss"] for each in steps),
    )


def setting_of(plan: Plan) -> Setting:
    """Return what a plan chose."""
    return Setting(
        tuner=plan.tuner,
        quantization=plan.quantization,
        strategy=plan.strategy,
        world_size=plan.world_size,
        compute_dtype=plan.compute_dtype,
        weights_dtype=plan.weights_dtype,
        attention=plan.attention,
        optim=plan.optim,
        micro_batch=plan.per_device_train_batch_size,
        accumulation=plan.gradient_accumulation_steps,
        checkpointing=plan.gradient_checkpointing,
        compiled=plan.compiled,
        threads=plan.threads,
    )


def rows_lacking(cell: Cell, plan: Plan, last: Repeat) -> str:
    """Return that a step has less than its batch, since the data has no more; "" where it has it.

    Args:
        cell: as it was asked for.
        plan: of its run.
        last: repeat that was measured.
    """
    if plan.steps_per_epoch != 1:
        return ""
    has, wanted, unit = plan.train_rows, plan.global_batch, "rows"
    if cell.procedure.packing:
        has = round(last.tokens / len(last.step_seconds))
        wanted, unit = round(_FULL * wanted * cell.length), "tokens"
    if has >= wanted:
        return ""
    return f"a step has all {has:,} {unit} that there are, fewer than its batch takes"


def forecast_of(plan: Plan, tokens_per_step: float | None, memory_bytes: int) -> Forecast:
    """Return what a plan expected.

    Args:
        plan: that was made.
        tokens_per_step: of all devices; None where not known.
        memory_bytes: at the peak.
    """
    time = plan.time
    if time is None:
        return Forecast(memory_bytes)
    rate = None if tokens_per_step is None else tokens_per_step / time.step_seconds
    return Forecast(memory_bytes, time.step_seconds, rate, time.uncertainty, time.basis)


def flop_per_token(run: Path, manifest: RunManifest) -> float | None:
    """Return the operations of a trained token in products with weights; None where not known.

    What is computed twice to spare memory counts once.
    """
    share = manifest.results.get("label_share")
    if share is None:
        return None
    plan = rundir.read_document(Plan, run, rundir.PLAN)
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    return model_flop(read_facts(Path(manifest.model_path)), plan, request, share)


def model_flop(model: ModelFacts, plan: Plan, request: TrainRequest, label_share: float) -> float:
    """Return the operations of a trained token, as `step_work` counts them.

    Args:
        model: its shape.
        plan: how it is trained.
        request: what was asked.
        label_share: of the tokens, how many carry loss.
    """
    made = replace(configuration_of(plan, request), checkpointing=False, world_size=1)
    work = model_work(model, request.target_modules)
    return step_work(work, made, 1.0, label_share, 1.0, 0.0).flop


def machine_plan(run: Path) -> Plan:
    """Return the plan of a run."""
    return rundir.read_document(Plan, run, rundir.PLAN)


def jail_of(run: Path) -> str:
    """Return the layer of the jail that a run was in, "" where it isn't written down."""
    try:
        return str(json.loads((run / rundir.SEAL).read_text(encoding="utf-8"))["layer"])
    except (OSError, ValueError, KeyError):
        return ""
