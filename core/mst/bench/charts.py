"""Scaling curves as SVG: how speed grows with length, batch or streams, measured values alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from mst.bench.lines import speed
from mst.bench.results import Measured

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 240, 56, 34, 12
# Okabe and Ito's colours, which all eyes tell apart; dashes tell further ones.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_DASHES = ("", "6 3", "2 3")
# What a legend and a chart hold; the rest is in the table.
MOST_CURVES = 14


@dataclass(frozen=True)
class Curve:
    """One line: (x, y) in rising order of x, and what it is."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    title: str
    axis: str
    curves: tuple[Curve, ...]


def charts(cells: Sequence[Measured]) -> list[Chart]:
    """Return the charts that the cells have enough points for."""
    by_length = _curves(
        (f"{_who(each)}, batch {each.cell.batch}", float(each.cell.length), each) for each in cells
    )
    by_batch = _curves(
        (f"{_who(each)}, {each.cell.length} tokens", float(each.cell.batch), each)
        for each in cells
        if each.cell.batch.isdigit()
    )
    found = [
        Chart("Training speed over length", "tokens a row or block", by_length),
        Chart("Training speed over batch", "rows or blocks a micro-batch", by_batch),
        Chart("Serving speed over streams", "streams at once", _serving(cells)),
    ]
    return [each for each in found if each.curves]


def _who(each: Measured) -> str:
    chip = each.machine.chip if each.machine else each.cell.device
    return f"{each.cell.model}, {each.cell.method} on {chip}"


def _curves(points: Iterable[tuple[str, float, Measured]]) -> tuple[Curve, ...]:
    found: dict[str, list[tuple[float, float]]] = {}
    for name, x, each in points:
        rate = speed(each)
        if rate is not None:
            found.setdefault(name, []).append((x, rate.median))
    return _whole(found)


def _serving(cells: Sequence[Measured]) -> tuple[Curve, ...]:
    found: dict[str, list[tuple[float, float]]] = {}
    for each in cells:
        for one in each.served:
            if one.tokens_per_second is not None:
                name = f"{_who(each)}, {one.target}"
                found.setdefault(name, []).append((float(one.streams), one.tokens_per_second))
    return _whole(found)


def _whole(found: dict[str, list[tuple[float, float]]]) -> tuple[Curve, ...]:
    """Return the curves that have two places on their axis."""
    curves = [Curve(name, tuple(sorted(points))) for name, points in found.items()]
    return tuple(each for each in curves if len({x for x, _ in each.points}) > 1)[:MOST_CURVES]


def svg(chart: Chart) -> str:
    """Return a chart as an SVG element; its x axis is logarithmic, its y axis begins at 0."""
    xs = sorted({x for curve in chart.curves for x, _ in curve.points})
    top = max(y for curve in chart.curves for _, y in curve.points) or 1.0
    first, last = math.log2(xs[0]), math.log2(xs[-1])
    wide, high = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - _TOP

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - first) / ((last - first) or 1)
        return round(_LEFT + across * wide, 1), round(_TOP + (1 - y / top) * high, 1)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 16 * len(chart.curves)}" role="img"'
        f' aria-label="{escape(chart.title)}">'
    ]
    for share in (0.0, 0.5, 1.0):
        y = place(xs[0], top * share)[1]
        parts.append(
            f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - 10}" y2="{y}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{top * share:.4g}</text>'
        )
    for x in xs:
        across = place(x, 0)[0]
        parts.append(
            f'<text x="{across}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>'
        )
    middle = _LEFT + wide / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(chart.axis)}</text>'
    )
    for number, curve in enumerate(chart.curves):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        places = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        style = f'stroke="{colour}" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" fill="none" stroke-width="2" {style}/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
        low = _HEIGHT + 16 * number + 10
        parts.append(
            f'<line x1="8" y1="{low - 4}" x2="32" y2="{low - 4}" stroke-width="2" {style}/>'
            f'<text x="38" y="{low}">{escape(curve.name)}</text>'
        )
    return "".join(parts) + "</svg>"
