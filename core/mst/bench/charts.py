"""Curves of speed as SVG: over length, batch, streams or days, of measured values alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape

from mst.bench.lines import rate, speed, trainer
from mst.bench.results import Measured

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 460, 240, 56, 30, 34, 12
# Of the legend; and what a number and a day take on the axis.
_LINE, _NUMBER, _DAY = 16, 24, 66
# Okabe and Ito's colours, which all eyes tell apart; dashes tell further ones.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_DASHES = ("", "6 3", "2 3")
# What a legend and a chart hold; the rest is in the table.
MOST_CURVES = 14


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        name: what it is.
        points: (x, y) in rising order of x.
        hollow: of these, the ones that are less sure than the others.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    hollow: frozenset[tuple[float, float]] = frozenset()


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title: what it shows.
        axis: what x is.
        curves: at least one.
        days: x counts days, as `datetime.date.toordinal` does; else its axis is logarithmic.
    """

    title: str
    axis: str
    curves: tuple[Curve, ...]
    days: bool = False


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
    peer = f" in {trainer(each)}" if each.cell.peer else ""
    return f"{each.cell.model}, {each.cell.method}{peer} on {chip}"


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


@dataclass(frozen=True)
class _Scale:
    """Where a chart's values lie in its picture."""

    first: float
    last: float
    top: float
    days: bool

    def place(self, x: float, y: float) -> tuple[float, float]:
        span = self._along(self.last) - self._along(self.first)
        across = (self._along(x) - self._along(self.first)) / span if span else 0.5
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_TOP + (1 - y / self.top) * (_HEIGHT - _BOTTOM - _TOP), 1),
        )

    def _along(self, x: float) -> float:
        return x if self.days else math.log2(x)

    def tick(self, x: float) -> str:
        return date.fromordinal(int(x)).isoformat() if self.days else f"{x:g}"


def svg(chart: Chart) -> str:
    """Return a chart as an SVG element; its y axis begins at 0."""
    xs = sorted({x for curve in chart.curves for x, _ in curve.points})
    top = max(y for curve in chart.curves for _, y in curve.points) or 1.0
    scale = _Scale(xs[0], xs[-1], top, chart.days)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _LINE * len(chart.curves)}" role="img"'
        f' aria-label="{escape(chart.title)}">',
        *_axes(chart, scale, xs),
    ]
    for number, curve in enumerate(chart.curves):
        parts += _drawn(curve, number, scale)
    return "".join(parts) + "</svg>"


def _axes(chart: Chart, scale: _Scale, xs: Sequence[float]) -> Iterator[str]:
    for share in (0.0, 0.5, 1.0):
        y = scale.place(xs[0], scale.top * share)[1]
        yield (
            f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{rate(scale.top * share)}</text>'
        )
    room = _DAY if chart.days else _NUMBER
    told = -math.inf
    for x in xs:
        across = scale.place(x, 0)[0]
        if across - told < room:  # its text would lie upon the last one's
            continue
        told = across
        yield (
            f'<text x="{across}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
            f"{scale.tick(x)}</text>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield (f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(chart.axis)}</text>')


def _drawn(curve: Curve, number: int, scale: _Scale) -> Iterator[str]:
    """Yield a curve and its line of the legend."""
    colour = _COLOURS[number % len(_COLOURS)]
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    style = f'stroke="{colour}" stroke-dasharray="{dash}"'
    path = " ".join(f"{x},{y}" for x, y in (scale.place(*point) for point in curve.points))
    yield f'<polyline points="{path}" fill="none" stroke-width="2" {style}/>'
    for point in curve.points:
        x, y = scale.place(*point)
        fill = "#fff" if point in curve.hollow else colour
        yield f'<circle cx="{x}" cy="{y}" r="3" fill="{fill}" stroke="{colour}"/>'
    low = _HEIGHT + _LINE * number + 10
    yield (
        f'<line x1="8" y1="{low - 4}" x2="32" y2="{low - 4}" stroke-width="2" {style}/>'
        f'<text x="38" y="{low}">{escape(curve.name)}</text>'
    )
