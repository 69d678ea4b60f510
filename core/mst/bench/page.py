"""Results as one HTML file that asks nobody for anything: no script, no font, no image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from mst.bench import figures
from mst.bench.charts import charts, svg
from mst.bench.figures import Prices
from mst.bench.lines import columns, in_order, plan_words, rate, speed, trainer
from mst.bench.result_file import SCHEMA
from mst.bench.results import DONE, FORECAST, Measured, Results

if TYPE_CHECKING:
    from jinja2 import Template

_DARKEST = 0.55


@dataclass(frozen=True)
class Square:
    """One square of the heat map.

    Attributes:
        text: what stands in it.
        title: more, for who points at it.
        shade: from 0, the slowest, to 1; None where nothing was measured.
    """

    text: str
    title: str
    shade: float | None


@dataclass(frozen=True)
class HeatMap:
    """Ways to train by chips: a square each."""

    chips: tuple[str, ...]
    ways: tuple[tuple[str, tuple[Square, ...]], ...]


def page(results: Results, prices: Prices) -> str:
    """Return the whole page."""
    measured, forecast = in_order(results.cells)
    shown = columns(prices)
    costs = [
        (each, figures.million_tokens_cost(each, prices), figures.million_tokens_kwh(each))
        for each in results.cells
    ]
    known = [each for each in costs if each[1] is not None or each[2] is not None]
    known.sort(key=lambda each: (each[1] is None, each[1] or 0.0))
    return _template().render(
        results=results,
        schema=SCHEMA,
        measured=len(measured),
        done=sum(each.status == DONE for each in measured),
        heat=heat_map(measured),
        forecast=heat_map(forecast) if forecast else None,
        charts=[(each, svg(each)) for each in charts(measured)],
        costs=known,
        currency=prices.currency or "price",
        headings=[name for name, _ in shown],
        rows=[(each.status, [_text(value(each)) for _, value in shown]) for each in results.cells],
        way=way,
        chip=chip,
        plan=plan_words,
    )


def way(each: Measured) -> str:
    """Return how a cell trains what."""
    cell = each.cell
    words = f"{cell.model} · {cell.method} · {cell.length} · {cell.batch}"
    return f"{words} · {trainer(each)}" if cell.peer else words


def chip(each: Measured) -> str:
    """Return on what, and where."""
    if each.machine is None:
        return each.cell.device
    node = f" @ {each.machine.node}" if each.machine.node else ""
    return f"{each.machine.chip} ({each.machine.device}){node}"


def heat_map(cells: Sequence[Measured]) -> HeatMap:
    """Return the heat map of cells; its shades follow the logarithm of the speed."""
    chips = list(dict.fromkeys(map(chip, cells)))
    ways = list(dict.fromkeys(map(way, cells)))
    by_place = {(way(each), chip(each)): each for each in cells}
    rates = [found.median for found in map(speed, cells) if found is not None and found.median > 0]
    low, high = (math.log(min(rates)), math.log(max(rates))) if rates else (0.0, 0.0)
    return HeatMap(
        tuple(chips),
        tuple(
            (name, tuple(_square(by_place.get((name, one)), low, high) for one in chips))
            for name in ways
        ),
    )


def _square(each: Measured | None, low: float, high: float) -> Square:
    if each is None:
        return Square("", "not in the matrix", None)
    found = speed(each)
    if found is None or found.median <= 0:
        status = "does not fit" if each.status == FORECAST else each.status
        return Square(status, each.reason, None)
    shade = (math.log(found.median) - low) / (high - low) if high > low else 1.0
    title = f"{rate(found.low)} to {rate(found.high)} tokens/s; {plan_words(each)}"
    return Square(rate(found.median), title, round(shade * _DARKEST, 3))


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _template() -> Template:
    from jinja2 import Environment

    text = files("mst.bench").joinpath("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
