"""Draw docs/speed-trend.svg from dated results: `python ci/make_speed_trend.py [--check]`.

A point is the training speed of one day: of the demo, from benchmarks/results/*-demo.json, or of a
cell of the matrix, from benchmarks/results/bench. Curves are of one chip each; where others used
the machine meanwhile, the point is hollow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from mst.bench.charts import Chart, Curve, svg
from mst.bench.figures import busy, tokens_per_second
from mst.bench.lines import trainer
from mst.bench.result_file import read_results
from mst.bench.results import DONE
from mst.durable import write_text
from mst.errors import MstError

ROOT = Path(__file__).resolve().parents[1]
RESULTS, BENCH = "benchmarks/results", "bench"
TARGET = "docs/speed-trend.svg"
# A picture that stands alone brings what the page of `mst bench` has in its style sheet.
STYLE = (
    "<style>text{font:11px system-ui,sans-serif;fill:#1b1f24}.grid{stroke:#dfe3e7}"
    "svg{background:#fff}</style>"
)


@dataclass(frozen=True)
class Point:
    """The speed of one way to train on one day.

    Attributes:
        curve: what was trained, how and on what.
        day: of the result.
        tokens_per_second: median of the day.
        busy: others used the machine.
    """

    curve: str
    day: date
    tokens_per_second: float
    busy: bool


def points(root: Path) -> Iterator[Point]:
    """Yield the points of all dated results.

    Raises:
        MstError: one is damaged, or not named by its day.
    """
    for path in sorted((root / RESULTS).glob("*-demo.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        machine = str(told["machine"]).partition(",")[0]
        speed = float(told["results"]["tokens_per_second"])
        yield Point(f"{told['case']} (the demo), {machine}", day_of(path), speed, False)
    for path in sorted((root / RESULTS / BENCH).glob("*.json")):
        for each in read_results(path).cells:
            found = tokens_per_second(each)
            if each.status != DONE or found is None or each.machine is None:
                continue
            cell = each.cell
            name = (
                f"{trainer(each)}: {cell.model}, {cell.method}, {cell.length} × {cell.batch},"
                f" {each.machine.chip}"
            )
            yield Point(name, day_of(path), found.median, busy(each))


def day_of(path: Path) -> date:
    """Return the day that a file of results is named by.

    Raises:
        MstError: it is named by none.
    """
    try:
        return date.fromisoformat(path.name[:10])
    except ValueError:
        raise MstError(f"{path} must be named by its day, such as 2026-11-27-ci.json.") from None


def chart(found: Sequence[Point]) -> Chart:
    """Return the chart of points; of several on one day the last one read counts.

    Raises:
        MstError: there is none.
    """
    curves: dict[str, dict[date, Point]] = {}
    for each in found:
        curves.setdefault(each.curve, {})[each.day] = each
    if not curves:
        raise MstError(f"no dated result in {RESULTS}: nothing to draw.")
    return Chart(
        "Training speed over days",
        "tokens a second",
        tuple(
            Curve(
                name,
                tuple(place(days[day]) for day in sorted(days)),
                frozenset(place(each) for each in days.values() if each.busy),
            )
            for name, days in sorted(curves.items())
        ),
        days=True,
    )


def place(each: Point) -> tuple[float, float]:
    """Return where a point lies."""
    return float(each.day.toordinal()), each.tokens_per_second


def document(root: Path) -> str:
    """Return the picture."""
    drawn = svg(chart(list(points(root))))
    head, rest = drawn.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{STYLE}{rest}\n'


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the picture; with --check write nothing, and return 1 when it differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is fresh")
    check = parser.parse_args(argv).check
    try:
        made = document(root)
    except MstError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    target = root / TARGET
    if target.is_file() and target.read_text("utf-8") == made:
        return 0
    if check:
        print(f"{TARGET} is stale. Run: python ci/make_speed_trend.py")
        return 1
    write_text(target, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
