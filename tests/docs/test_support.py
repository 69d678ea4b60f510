"""The support table says what the dated reports say, and docs/vendors.md what simchip does."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.measured_cells import CPU, cell, measured, repeat, results

from mst.bench.result_file import write_results
from mst.conformance import report as reports
from mst.conformance.report import report_is_whole
from mst.errors import MstError

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
RESULTS = ROOT / "benchmarks/results"
REPORTS = sorted(RESULTS.glob("hardware/*.json")) + sorted(RESULTS.glob("simulated/*.json"))
FOLDERS = {"cpu": "hardware", "simchip": "simulated"}
A100 = {
    "backend": "cuda", "index": 0, "name": "NVIDIA A100-SXM4-80GB", "arch": "sm80",
    "memory_total_bytes": 81920 * 2**20, "features": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return ci/make_support_table.py as a module."""
    return loaded("make_support_table")


@pytest.fixture(scope="module")
def trend() -> ModuleType:
    """Return ci/make_speed_trend.py as a module."""
    return loaded("make_speed_trend")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"ci/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their annotations up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a directory with both READMEs and the committed reports, to be changed by a test."""
    for name in READMES:
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("hardware", "simulated"):
        source = ROOT / "benchmarks/results" / folder
        shutil.copytree(source, tmp_path / "benchmarks/results" / folder)
    return tmp_path


def add_report(
    checkout: Path, folder: str, device: dict[str, Any], day: str, **changes: Any
) -> Path:
    """Write a report of this device as the kit would: every check passed, sealed."""
    text = REPORTS[0].read_text(encoding="utf-8")
    report = json.loads(text) | {"backend": device["backend"], "date": f"{day}T09:00:00+00:00"}
    report["facts"]["probe"]["devices"] = [device]
    report |= {"counts": {"pass": 43}} | changes
    report["sha256"] = reports._seal(report)
    path = checkout / "benchmarks/results" / folder / f"{day}-{device['backend']}.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    return path


def rows(checkout: Path) -> list[list[str]]:
    """Return the cells of the English table, without its head."""
    text = (checkout / "README.md").read_text("utf-8").split("<!-- support:begin -->")[1]
    lines = [line for line in text.partition("<!-- support:end -->")[0].splitlines() if "|" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("name", READMES)
def test_the_support_table_is_fresh(name: str, script: ModuleType) -> None:
    made = script.documents()[name]

    assert (ROOT / name).read_text("utf-8") == made, "run: python ci/make_support_table.py"


@pytest.mark.parametrize("path", REPORTS, ids=[path.stem for path in REPORTS])
def test_a_committed_report_is_whole_and_of_its_day(path: Path) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))

    assert report_is_whole(path)
    assert report["complete"]
    assert path.name.startswith(f"{report['date'][:10]}-{report['backend']}")
    assert path.parent.name in ("hardware", "simulated")


def test_the_cpu_is_hardware_and_the_simulated_chips_are_called_so() -> None:
    by_backend = {(cells[1], cells[2]): cells for cells in rows(ROOT)}

    assert ("`cpu`", "hardware") in by_backend
    assert by_backend["`simchip`", "simulated"][0] == "2 × SimChip v1"
    assert ("`ascend`", "simulated") in by_backend
    assert ("`simchip`", "hardware") not in by_backend


def test_a_first_report_takes_its_chip_from_those_that_never_ran(
    script: ModuleType, checkout: Path
) -> None:
    before = next(cells for cells in rows(checkout) if cells[1:3] == ["`cuda`", "never run"])
    add_report(checkout, "hardware", A100, "2026-11-25")
    assert script.main(["--check"], checkout) == 1
    assert script.main([], checkout) == 0
    assert script.main(["--check"], checkout) == 0
    row = next(cells for cells in rows(checkout) if cells[0] == A100["name"])
    after = next(cells for cells in rows(checkout) if cells[1:3] == ["`cuda`", "never run"])

    assert row[1:3] == ["`cuda`", "hardware"]
    assert row[3].startswith("[2026-11-25](benchmarks/results/hardware/2026-11-25-cuda.json), mst")
    assert row[4] == "43 / 0 / 0"
    gone = set(before[0].split(", ")) - set(after[0].split(", "))
    assert gone == {"A100-SXM4-80GB"}


def test_the_newest_report_of_a_device_counts_and_a_failure_shows(
    script: ModuleType, checkout: Path
) -> None:
    add_report(checkout, "hardware", A100, "2026-11-25")
    add_report(checkout, "hardware", A100, "2026-11-26", counts={"pass": 40, "fail": 3})
    add_report(checkout, "simulated", A100, "2026-11-27")
    script.main([], checkout)
    found = [cells[2:] for cells in rows(checkout) if cells[0] == A100["name"]]

    assert [(cells[0], cells[1][1:11], cells[2]) for cells in found] == [
        ("hardware", "2026-11-26", "40 / 3 / 0"),
        ("simulated", "2026-11-27", "43 / 0 / 0"),
    ]


def bench_results(checkout: Path, day: str, speed: float, busy: float = 0.0) -> Path:
    """Write what a bench measured on the reported CPU, and on the simulated chip."""
    cells = []
    for kind in ("cpu", "simchip"):
        report = max((RESULTS / FOLDERS[kind]).glob(f"*-{kind}.json"))
        name = json.loads(report.read_text("utf-8"))["facts"]["probe"]["devices"][0]["name"]
        run = repeat(speed, busy_before=busy)
        machine = replace(CPU, chip=name, device=f"{kind}:0")
        cells.append(measured(machine=machine, cell=cell(device=kind), repeats=(run,)))
    path = checkout / "benchmarks/results/bench" / f"{day}-ci.json"
    path.parent.mkdir(exist_ok=True)
    write_results(path, results(*cells))
    return path


def test_a_device_has_the_speed_of_its_newest_results_and_a_simulated_one_has_none(
    script: ModuleType, checkout: Path
) -> None:
    bench_results(checkout, "2026-11-26", 1000.0)
    bench_results(checkout, "2026-11-27", 1234.0, busy=0.6)
    script.main([], checkout)
    speeds = {(cells[1], cells[2]): cells[5] for cells in rows(checkout)}

    assert speeds["`cpu`", "hardware"] == (
        "[2026-11-27](benchmarks/results/bench/2026-11-27-ci.json), smollm2, lora, 512 × 4: 1234"
        " (others used the machine)"
    )
    assert speeds["`simchip`", "simulated"] == ""
    assert script.main(["--check"], checkout) == 0


def test_the_picture_of_the_speed_is_fresh(trend: ModuleType) -> None:
    assert trend.main(["--check"]) == 0, "run: python ci/make_speed_trend.py"


def test_the_picture_has_a_point_a_day_and_is_hollow_where_others_were_at_work(
    trend: ModuleType, checkout: Path
) -> None:
    bench_results(checkout, "2026-11-26", 1000.0)
    bench_results(checkout, "2026-11-27", 1100.0, busy=0.6)
    found = trend.chart(list(trend.points(checkout)))
    assert trend.main(["--check"], checkout) == 1
    (checkout / "docs").mkdir()
    assert trend.main([], checkout) == 0
    drawn = ElementTree.fromstring((checkout / "docs/speed-trend.svg").read_text("utf-8"))
    circles = [each for each in drawn.iter() if each.tag.endswith("circle")]

    assert [[speed for _, speed in curve.points] for curve in found.curves] == [[1000, 1100]] * 2
    assert [len(curve.hollow) for curve in found.curves] == [1, 1]
    assert [each.get("fill") == "#fff" for each in circles] == [False, True] * 2
    assert "2026-11-26" in "".join(drawn.itertext())


def test_results_that_were_edited_or_have_no_day_are_no_point(
    trend: ModuleType, script: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench_results(checkout, "2026-11-27", 1000.0)
    path.rename(path.with_name("newest.json"))
    codes = [trend.main([], checkout)]
    path.with_name("newest.json").unlink()
    path.write_text("{}", encoding="utf-8")
    codes += [trend.main([], checkout), script.main([], checkout)]
    said = capsys.readouterr().err

    assert codes == [1, 1, 1]
    assert "must be named by its day" in said
    assert said.count("is no results of `mst bench`") == 2


def test_both_languages_list_the_same_reports(script: ModuleType, checkout: Path) -> None:
    add_report(checkout, "hardware", A100, "2026-11-25")
    made = script.documents(checkout)
    links = {name: re.findall(r"\]\((benchmarks\S+)\)", text) for name, text in made.items()}

    assert links["README.md"] == links["README.zh-CN.md"]
    assert len(links["README.md"]) == len(REPORTS) + 1


def test_a_report_that_was_edited_is_refused(
    script: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = add_report(checkout, "hardware", A100, "2026-11-25")
    path.write_text(path.read_text("utf-8").replace('"pass": 43', '"pass": 44'), "utf-8")

    assert script.main([], checkout) == 1
    assert "2026-11-25-cuda.json was changed after it was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"complete": False}, "is of some checks only"),
        ({"facts": None}, "lists no device"),
        ({"date": "2026-11-26T00:00:00+00:00"}, "must be named 2026-11-26-cuda"),
    ],
)
def test_a_report_that_proves_too_little_is_refused(
    changes: dict[str, Any], words: str, script: ModuleType, checkout: Path
) -> None:
    add_report(checkout, "hardware", A100, "2026-11-25", **changes)

    with pytest.raises(MstError, match=words):
        script.documents(checkout)


def test_a_readme_without_its_markers_is_an_error(script: ModuleType) -> None:
    with pytest.raises(MstError, match="support:begin"):
        script.with_table("# A readme\n", "a table")


def test_the_vendors_guide_quotes_simchip_word_for_word() -> None:
    guide = (ROOT / "docs/vendors.md").read_text(encoding="utf-8")
    module = (ROOT / "tests/vendor/simchip/mst_simchip.py").read_text(encoding="utf-8")
    quoted = re.findall(r"^```py\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)

    assert len(quoted) >= 4
    assert [block for block in quoted if block.strip() not in module] == []
