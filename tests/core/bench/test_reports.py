"""Reports: the same figures in the terminal, the CSV and the page, forecasts apart, and fast."""

from __future__ import annotations

import csv
import io
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from tests.measured_cells import A100, CPU, cell, failed, forecast, measured, repeat, results

from mst import cli
from mst.bench.charts import charts, svg
from mst.bench.compare import compare
from mst.bench.figures import Prices
from mst.bench.job import WAITING
from mst.bench.lines import csv_text
from mst.bench.live import Progress
from mst.bench.page import heat_map, page
from mst.bench.result_file import read_results, write_results
from mst.bench.results import Results
from mst.bench.table import show_comparison, show_results

PRICES = Prices({"epyc": 0.36, "a100": 3.6}, currency="EUR")
EVIL = "<script>alert(1)</script>"


def several() -> Results:
    """Return two lengths on two chips, a cell without memory, one without a device, a forecast."""
    long = cell(length=1024)
    return results(
        measured(),
        measured((600.0, 610.0), cell=long),
        measured((20_000.0,), machine=A100),
        failed("out of memory", "step 1 of 7", cell=long, machine=A100),
        failed("absent", "no 'ascend' device here", cell=cell(device="ascend"), machine=None),
        forecast(),
    )


def printed(found: Results, prices: Prices = PRICES) -> str:
    console = Console(file=io.StringIO(), width=220, highlight=False, markup=False)
    show_results(console, found, prices)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Page(HTMLParser):
    """Notes what a page asks for, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in ("meta", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_the_terminal_shows_figures_spread_and_why_a_cell_has_none() -> None:
    shown = printed(several())
    first, _, last = shown.partition("forecast, not measured")

    assert "1,000 ±1.0%" in shown
    assert "40.0% / 50.0%" in shown  # of the catalogue's peak, of the measured product's
    assert "3.00 GiB (+3%)" in shown
    assert "out of memory: smollm2, lora, 1024, 4: step 1 of 7" in shown
    assert "absent: smollm2, lora, 512, 4: no 'ascend' device here" in shown
    assert "20,000 (13,333–30,000)" in last
    assert "13,333" not in first


def test_figures_are_whole_in_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    each = measured(repeats=(repeat(990.0), repeat(1010.0, energy_joules=500.0)))
    show_results(console, results(each), Prices({}))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()

    assert "…" not in shown
    assert "0.0174" in shown  # kWh of a million tokens
    assert all(each in shown for each in ("1,000 ±1.0%", "40.0% / 50.0%", "(+3%)", "2.5000"))


def test_a_comparison_is_whole_in_a_narrow_terminal() -> None:
    old, new = results(measured((1000.0,))), results(measured((800.0,)))
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    show_comparison(console, compare(old, new))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()

    assert "…" not in shown
    told = ("tokens/s", "memory", "eval loss", "1000", "800", "0.800", "WORSE")
    assert [each for each in told if each not in shown] == []
    assert "note    1 figures: one repeat each" in shown


def test_costs_are_shown_for_the_prices_that_were_given() -> None:
    shown = printed(several())

    assert re.search(r"smollm2, lora, 512, 4\s+AMD EPYC 9555\s+0\.1\s", shown)
    assert re.search(r"NVIDIA A100-SXM4-80GB\s+0\.05\s+-\s+forecast", shown)
    assert "EUR" not in printed(several(), Prices({}))


def test_the_csv_has_a_line_a_cell_with_versions_plan_and_load() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(several(), PRICES))))
    first = lines[0]

    assert [each["status"] for each in lines] == [
        "done", "done", "done", "out of memory", "absent", "forecast",
    ]  # fmt: skip
    assert float(first["tokens_per_second"]) == pytest.approx(1000)
    assert (first["chip"], first["commit"], first["jail"]) == (CPU.chip, "c" * 40, "user-namespace")
    assert first["versions"] == "python 3.11.9; torch 2.13.0"
    assert first["plan"] == "lora, bfloat16, 4 × 1, sdpa, 2 threads"
    assert (first["load_before"], first["busy_before"]) == ("0.5", "0")
    assert first["exports"] == "merged passed"
    assert first["export_gate"] == "merged: 1 / 1e-06 / 1"
    assert first["serving_tokens_per_second"] == "run × 1: 20; run × 8: 90"
    assert first["serving_first_token_seconds"] == "run × 1: 0.5 / 0.6; run × 8: 0.9 / 1.4"
    assert (first["joules_per_token"], first["energy_reason"]) == ("", "no RAPL driver")


def test_heat_and_what_slowed_a_device_stand_beside_its_figures() -> None:
    hot = repeat(temperature_celsius=83.0, throttled=("SW thermal", "power cap"))
    runs = (repeat(temperature_celsius=61.0, throttled=("power cap",)), hot)
    line = next(csv.DictReader(io.StringIO(csv_text(results(measured(repeats=runs)), PRICES))))

    assert (line["celsius"], line["throttled"]) == ("83", "power cap; SW thermal")
    assert "SW thermal" in page(results(measured(repeats=runs)), PRICES)


def test_why_energies_are_not_known_is_told_once_for_all_cells() -> None:
    shown = printed(several())

    assert shown.count("no RAPL driver") == 1
    assert "energy  not known of 3 cells: no RAPL driver" in shown


def test_a_cell_of_a_csv_is_no_formula() -> None:
    lines = csv_text(results(failed("failed", "=HYPERLINK(1)")), PRICES).splitlines()

    assert ",'=HYPERLINK(1)," in lines[1]


def test_the_page_stands_alone_and_is_well_formed() -> None:
    text = page(several(), PRICES)
    found = Page(text)

    assert found.open == []
    assert found.asked == []
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert "http:" not in text
    assert "default-src 'none'" in text
    assert found.tags.count("svg") == 2  # over length, and over streams
    assert "Tokens a second, forecast" in text


def test_names_in_results_are_text_on_the_page() -> None:
    odd = measured(cell=cell(model=EVIL), machine=replace(CPU, chip=EVIL, node=EVIL), notes=(EVIL,))
    long = measured(cell=cell(model=EVIL, length=64), machine=replace(CPU, chip=EVIL))
    text = page(Results(EVIL, EVIL, (odd, long), (EVIL,)), PRICES)

    assert "<script>" not in text
    assert Page(text).open == []


def test_the_heat_map_is_darkest_where_it_is_fastest() -> None:
    found = heat_map(several().cells[:5])
    squares = {name: [one.text for one in row] for name, row in found.ways}
    shades = [one.shade for _, row in found.ways for one in row if one.shade is not None]

    assert [each.split(" (")[0] for each in found.chips] == [CPU.chip, A100.chip, "ascend"]
    assert squares["smollm2 · lora · 1024 · 4"] == ["605", "out of memory", ""]
    assert min(shades) == 0
    assert found.ways[0][1][1].shade == max(shades)


def test_curves_need_two_places_on_their_axis() -> None:
    kinds = [each.title for each in charts(several().cells)]
    alone = charts([measured(served=())])

    assert kinds == ["Training speed over length", "Serving speed over streams"]
    assert alone == []


def test_speeds_on_an_axis_are_written_out() -> None:
    cells = [measured((12_000.0,), cell=cell(length=length)) for length in (512, 1024)]

    assert ">12,000</text>" in svg(charts(cells)[0])


def test_a_thousand_cells_are_read_and_rendered_in_two_seconds(tmp_path: Path) -> None:
    cells = [
        measured(cell=cell(length=2 + place, device=device), machine=machine)
        for place in range(500)
        for device, machine in (("cpu", CPU), ("cuda", A100))
    ]
    write_results(tmp_path / "results.json", results(*cells))
    # The process's own seconds: others may be at work.
    began = time.process_time()
    found = read_results(tmp_path)
    text = page(found, PRICES)
    seconds = time.process_time() - began

    assert len(found.cells) == 1000
    assert text.count("<tr") > 1500
    assert seconds < 2


def test_show_writes_page_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "results.json", several())
    log = ["--audit-log", str(tmp_path / "audit")]
    options = ["--html", str(tmp_path / "a.html"), "--csv", str(tmp_path / "a.csv")]
    prices = ["--price", "epyc=0.36", "a100=3.6", "--currency", "EUR"]
    code = cli.main(["bench", "show", str(tmp_path), *options, *prices, *log])
    shown = capsys.readouterr().out
    lost = cli.main(["bench", "show", str(tmp_path), "--html", "/proc/a.html", *log])

    assert (code, lost) == (0, 2)
    assert (tmp_path / "a.html").read_text() == page(several(), PRICES)
    assert (tmp_path / "a.csv").read_text().startswith("id,model,method")
    assert f"wrote   {tmp_path}/a.html" in shown
    assert "--html /proc/a.html cannot be written" in capsys.readouterr().err


def test_the_time_left_is_that_of_the_cells_so_far() -> None:
    now = [0.0]
    progress = Progress(lambda: now[0])
    cells = [cell(length=2 + place) for place in range(6)]
    progress.planned(cells, [measured(cell=cells[0])])
    before = progress.seconds_left()
    progress.stage(cells[1], "repeat 1 of 3")
    now[0] = 30.0
    progress.measured(measured(cell=cells[1]))

    assert before is None
    assert progress.seconds_left() == pytest.approx(4 * 30)
    assert progress.line() == "2 of 6 cells, about 2.0 minutes left"
    assert progress.stages == {}


def test_cells_that_ray_was_given_do_not_count_as_half_done() -> None:
    now = [0.0]
    progress = Progress(lambda: now[0])
    cells = [cell(length=2 + place) for place in range(100)]
    progress.planned(cells, [])
    for each in cells:
        progress.stage(each, WAITING)
    now[0] = 40.0
    progress.measured(measured(cell=cells[0]))

    assert progress.seconds_left() == pytest.approx(99 * 40)
