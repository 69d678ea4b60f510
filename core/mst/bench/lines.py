"""A cell as one line of figures: what the terminal, the CSV and the page all show."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from mst.bench import figures
from mst.bench.figures import Prices, Spread
from mst.bench.results import FORECAST, Exported, Measured, Results, Served

Value = str | int | float | None
Column = tuple[str, Callable[[Measured], Value]]


def columns(prices: Prices) -> list[Column]:
    """Return every figure of a cell: its name with the unit, and where it comes from."""
    return [
        ("id", lambda each: each.id),
        ("model", lambda each: each.cell.model),
        ("method", lambda each: each.cell.method),
        ("trainer", trainer),
        ("length", lambda each: each.cell.length),
        ("batch", lambda each: each.cell.batch),
        ("device", lambda each: each.machine.device if each.machine else each.cell.device),
        ("chip", lambda each: each.machine.chip if each.machine else ""),
        ("node", lambda each: each.machine.node if each.machine else ""),
        ("status", lambda each: each.status),
        ("reason", lambda each: each.reason),
        ("repeats", lambda each: len(each.repeats)),
        ("tokens_per_second", lambda each: _middle(speed(each))),
        ("tokens_per_second_low", lambda each: _low(speed(each))),
        ("tokens_per_second_high", lambda each: _high(speed(each))),
        ("step_seconds", lambda each: _middle(seconds(each))),
        ("mfu_catalogue", lambda each: figures.mfu(each, each.peak.catalogue_tflops)),
        ("mfu_measured", lambda each: figures.mfu(each, each.peak.measured_tflops)),
        ("catalogue_tflops", lambda each: each.peak.catalogue_tflops),
        ("measured_tflops", lambda each: each.peak.measured_tflops),
        ("peak_memory_bytes", lambda each: _middle(figures.peak_memory(each))),
        ("forecast_memory_bytes", lambda each: each.forecast and each.forecast.memory_bytes),
        ("forecast_step_seconds", lambda each: each.forecast and each.forecast.step_seconds),
        ("joules_per_token", lambda each: _middle(figures.joules_per_token(each))),
        ("energy_reason", lambda each: each.energy_reason),
        ("kwh_per_million_tokens", figures.million_tokens_kwh),
        ("cost_per_million_tokens", lambda each: figures.million_tokens_cost(each, prices)),
        ("loss", lambda each: _middle(figures.over_repeats(each, lambda one: one.loss))),
        ("eval_loss", lambda each: _middle(figures.over_repeats(each, lambda one: one.eval_loss))),
        ("loss_difference", lambda each: each.loss_difference),
        ("exports", _exports),
        ("export_seconds", lambda each: _joined(f"{one.seconds:g}" for one in each.exported)),
        ("export_gate", lambda each: _joined(map(_gate, each.exported))),
        ("serving_tokens_per_second", lambda each: _joined(map(_served, each.served))),
        ("serving_first_token_seconds", lambda each: _joined(map(_waited, each.served))),
        ("plan", plan_words),
        ("world_size", lambda each: each.setting and each.setting.world_size),
        ("jail", lambda each: each.jail),
        ("mst_version", lambda each: each.mst_version),
        ("commit", lambda each: each.commit),
        ("driver", lambda each: each.machine.driver if each.machine else ""),
        ("versions", lambda each: _joined(f"{k} {v}" for k, v in sorted(each.versions.items()))),
        ("load_before", lambda each: _most(one.load_before for one in each.repeats)),
        ("busy_before", lambda each: _most(one.busy_before for one in each.repeats)),
        ("celsius", lambda each: _most(one.temperature_celsius for one in each.repeats)),
        ("throttled", _throttled),
        ("began", lambda each: each.began),
        ("notes", lambda each: "; ".join(each.notes)),
    ]


def trainer(each: Measured) -> str:
    """Return what trained a cell: mst, or a peer with its version."""
    peer = each.cell.peer
    return f"{peer} {each.versions.get(peer, '')}".strip() or "mst"


def speed(each: Measured) -> Spread | None:
    """Return the tokens a second, measured or, of a forecast, expected."""
    if each.status == FORECAST and each.forecast and each.forecast.tokens_per_second:
        expected, factor = each.forecast.tokens_per_second, each.forecast.uncertainty or 1.0
        return Spread(expected, expected / factor, expected * factor, 0)
    return figures.tokens_per_second(each)


def seconds(each: Measured) -> Spread | None:
    """Return the seconds a step, measured or, of a forecast, expected."""
    if each.status == FORECAST and each.forecast and each.forecast.step_seconds:
        took, factor = each.forecast.step_seconds, each.forecast.uncertainty or 1.0
        return Spread(took, took / factor, took * factor, 0)
    return figures.step_seconds(each)


def rate(value: float) -> str:
    """Return tokens a second as a person reads them."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def plan_words(each: Measured) -> str:
    """Return what the plan chose, in a few words; "" where there was no plan."""
    made = each.setting
    if made is None:
        return ""
    parts = [
        made.tuner,
        made.quantization if made.quantization != "none" else "",
        made.compute_dtype,
        f"{made.strategy} × {made.world_size}" if made.world_size > 1 else "",
        f"{made.micro_batch} × {made.accumulation}",
        "checkpointing" if made.checkpointing else "",
        "compiled" if made.compiled else "",
        made.attention,
        f"{made.threads} threads",
    ]
    return ", ".join(part for part in parts if part)


def csv_text(results: Results, prices: Prices) -> str:
    """Return results as CSV (RFC 4180), a line a cell; forecasts have that status."""
    shown = columns(prices)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([name for name, _ in shown])
    for each in results.cells:
        writer.writerow([_plain(value(each)) for _, value in shown])
    return text.getvalue()


def _plain(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    # A spreadsheet takes what begins so for a formula (OWASP, CSV injection).
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def _middle(found: Spread | None) -> float | None:
    return None if found is None else found.median


def _low(found: Spread | None) -> float | None:
    return None if found is None else found.low


def _high(found: Spread | None) -> float | None:
    return None if found is None else found.high


def _exports(each: Measured) -> str:
    return _joined(f"{one.format} {one.status}" for one in each.exported)


def _served(one: Served) -> str:
    told = "-" if one.tokens_per_second is None else rate(one.tokens_per_second)
    return f"{one.target} × {one.streams}: {told}"


def _gate(one: Exported) -> str:
    """Return what the gate found: the perplexity's ratio, the divergence, the agreement."""
    found = (one.perplexity_ratio, one.mean_kl, one.agreement)
    return f"{one.format}: {' / '.join(map(_short, found))}"


def _waited(one: Served) -> str:
    """Return the median wait for the first token, and which 95 % waited at most."""
    found = (one.first_token_seconds, one.first_token_p95_seconds)
    return f"{one.target} × {one.streams}: {' / '.join(map(_short, found))}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _throttled(each: Measured) -> str:
    return _joined(dict.fromkeys(why for one in each.repeats for why in one.throttled))


def _most(values: Iterable[float | None]) -> float | None:
    return max((each for each in values if each is not None), default=None)


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(parts)


def in_order(cells: Sequence[Measured]) -> tuple[list[Measured], list[Measured]]:
    """Return what was measured, and apart from it what was forecast."""
    return (
        [each for each in cells if each.status != FORECAST],
        [each for each in cells if each.status == FORECAST],
    )
