"""Curves drawn with characters in the terminal, and as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mst.errors import MstError

Points = Sequence[tuple[int, float]]
# One mark a curve; they stay apart without colour, and in a log.
MARKS = "•◆○◇▲△■□+×*#@&%$=~"


def draw(curves: Mapping[str, Points], width: int = 64, height: int = 12) -> str:
    """Return curves as lines of text, with their range, steps and marks; "" without any point.

    Args:
        curves: name to (step, value) points; a later curve is drawn over an earlier one.
        width: columns of the drawing. A column shows the mean of the points that fall into it.
        height: its rows.
    """
    # A loss that is not a number, or not finite, has no place on the axis.
    kept = {
        name: [each for each in points if math.isfinite(each[1])] for name, points in curves.items()
    }
    steps = [step for points in kept.values() for step, _ in points]
    if not steps:
        return ""
    ends = min(steps), max(steps)
    columns = {name: _columns(points, *ends, width) for name, points in kept.items()}
    values = [value for each in columns.values() for value in each.values()]
    low, high = min(values), max(values)
    grid = [[" "] * width for _ in range(height)]
    marks = {name: MARKS[index % len(MARKS)] for index, name in enumerate(kept)}
    for name, each in columns.items():
        for column, value in each.items():
            row = round((high - value) / ((high - low) or 1) * (height - 1))
            grid[row][column] = marks[name]
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [f"{labels.get(i, ''):>9} │{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    first, last = map(str, ends)
    lines.append(f"{'':9} └{'─' * width}")
    lines.append(f"{'step':>9}  {first:<{width - len(last)}}{last}")
    lines.append(f"{'':9}  " + "   ".join(f"{mark} {name}" for name, mark in marks.items()))
    return "\n".join(lines)


def _columns(points: Points, first: int, last: int, width: int) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault(round((step - first) / ((last - first) or 1) * (width - 1)), []).append(
            value
        )
    return {column: sum(values) / len(values) for column, values in found.items()}


def write_png(curves: Mapping[str, Points], file: Path) -> None:
    """Write the curves as a PNG.

    Raises:
        MstError: matplotlib is not installed, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MstError(
            "--png needs matplotlib, which is not installed."
            " Install it: pip install 'mst-train[plot]'"
        ) from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        marker = "." if len(points) < 50 else None
        axes.plot(
            [step for step, _ in points], [value for _, value in points], marker=marker, label=name
        )
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    try:
        figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise MstError(
            f"cannot write --png {file}: {error.strerror}. Choose a file that can be written."
        ) from None
