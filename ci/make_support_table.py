"""Write the support tables of both READMEs: `python ci/make_support_table.py [--check]`.

A row is the newest report of a device in benchmarks/results/hardware or …/simulated; the folder
says which it was. Chips of the catalogue that have no report from hardware are listed as never run.
The training speed of a real device is that of the newest results of `mst bench` in …/bench.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.bench.figures import busy, tokens_per_second
from mst.bench.result_file import read_results
from mst.bench.results import DONE, Measured
from mst.catalogue import KnownChip, find, known_chips
from mst.conformance.report import read_report, report_is_whole
from mst.errors import MstError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
FOLDERS = ("hardware", "simulated")
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


@dataclass(frozen=True)
class Words:
    """The table's texts in one language."""

    head: tuple[str, ...]
    hardware: str
    simulated: str
    never: str
    other: str
    vendor: str
    notes: str
    busy: str


WORDS = {
    "README.md": Words(
        (
            "device",
            "backend",
            "status",
            "report",
            "checks passed / failed / skipped",
            "training speed",
        ),
        "hardware",
        "simulated",
        "never run",
        "any other chip",
        "a vendor's plugin: [docs/vendors.md](docs/vendors.md)",
        "*hardware*: the conformance kit ran on this device. *simulated*: it ran on a simulated"
        " chip, which stands\nin for the vendor's driver; no real one was used. *never run*: nobody"
        " has sent a report.\n*training speed*: of `mst bench`, tokens a second; simulated chips"
        " have none of their own. Over the days:\n[docs/speed-trend.svg](docs/speed-trend.svg).",
        "others used the machine",
    ),
    "README.zh-CN.md": Words(
        ("设备", "后端", "状态", "报告", "检查：通过 / 失败 / 跳过", "训练速度"),
        "硬件",
        "模拟",
        "从未运行",
        "其他芯片",
        "厂商的插件：[docs/vendors.zh-CN.md](docs/vendors.zh-CN.md)",
        "*硬件*：一致性测试在此设备上运行过。*模拟*：在代替厂商驱动的模拟芯片上运行过，没有用到真实芯片。"
        "\n*从未运行*：还没有人提交报告。*训练速度*：由 `mst bench` 测得，"
        "单位为每秒词元数；模拟芯片没有自己的速度。\n随日期的变化：[docs/speed-trend.svg](docs/speed-trend.svg)。",
        "测量时机器还有其他负载",
    ),
}


@dataclass(frozen=True)
class Run:
    """One report: where it lies, whether on hardware or simulated, and what it says."""

    path: Path
    folder: str
    report: Mapping[str, Any]


def read_runs(results: Path) -> list[Run]:
    """Return the reports of both folders, the newest first.

    Raises:
        MstError: one is no report, was changed, is of some checks only, or lists no device.
    """
    runs = []
    for folder in FOLDERS:
        for path in sorted((results / folder).glob("*.json")):
            if not report_is_whole(path):
                raise MstError(f"{path} was changed after it was written: run the kit anew.")
            report = read_report(path)
            if not report["complete"]:
                raise MstError(f"{path} is of some checks only: run the kit without --only.")
            if not devices(report):
                raise MstError(f"{path} lists no device: run the kit where there is one.")
            if not path.name.startswith(report["date"][:10]):
                raise MstError(f"{path} must be named {report['date'][:10]}-{report['backend']}….")
            runs.append(Run(path, folder, report))
    return sorted(runs, key=lambda run: str(run.report["date"]), reverse=True)


@dataclass(frozen=True)
class Speed:
    """The training speed of a device, from the newest results of a bench that has it."""

    path: Path
    measured: Measured


def read_speeds(results: Path) -> dict[tuple[str, str], Speed]:
    """Return the speed of each device, by its backend and its name: mst's first cell that is done.

    Raises:
        MstError: a file of results is damaged.
    """
    found: dict[tuple[str, str], Speed] = {}
    for path in sorted((results / "bench").glob("*.json"), reverse=True):
        for each in read_results(path).cells:
            if each.status == DONE and not each.cell.peer and each.machine is not None:
                backend = each.machine.device.partition(":")[0]
                found.setdefault((backend, each.machine.chip), Speed(path, each))
    return found


def speed_text(run: Run, speeds: Mapping[tuple[str, str], Speed], words: Words, root: Path) -> str:
    """Return the training speed of a report's device, "" where it is simulated or not known."""
    names = [str(device["name"]) for device in devices(run.report)]
    known = [speeds[key] for name in names if (key := (str(run.report["backend"]), name)) in speeds]
    rate = tokens_per_second(known[0].measured) if known else None
    if run.folder != "hardware" or rate is None:
        return ""
    path, cell = known[0].path, known[0].measured.cell
    way = f"{Path(cell.model).name}, {cell.method}, {cell.length} × {cell.batch}"
    link = f"[{path.name[:10]}]({path.relative_to(root).as_posix()})"
    doubt = f" ({words.busy})" if busy(known[0].measured) else ""
    return f"{link}, {way}: {rate.median:.0f}{doubt}"


def devices(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the facts of a report's devices."""
    facts = report["facts"]
    return facts["probe"]["devices"] if facts else []


def newest(runs: Sequence[Run]) -> list[Run]:
    """Return one run a device and folder, hardware first, then by backend and device."""
    kept: dict[tuple[str, str, str], Run] = {}
    for run in runs:
        key = (run.folder, str(run.report["backend"]), label(devices(run.report)))
        kept.setdefault(key, run)
    return [kept[key] for key in sorted(kept)]


def label(found: Sequence[Mapping[str, Any]]) -> str:
    """Return what a row calls its devices: "2 × SimChip v1"; a CPU with its instruction set."""
    names = []
    for device in found:
        chip, name = chip_of(device), str(device["name"])
        names.append(f"{name} ({chip.name})" if chip and name not in chip.names else name)
    counted = Counter(names).items()
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in counted)


def chip_of(device: Mapping[str, Any]) -> KnownChip | None:
    """Return the catalogue's chip that a device is, or None; a CPU is its best instruction set."""
    if chip := find(device["backend"], device["name"], device["memory_total_bytes"]):
        return chip
    for chip in known_chips():
        same = (chip.backend, chip.arch) == (device["backend"], device["arch"])
        if same and set(chip.names) & set(device["features"]):
            return chip
    return None


def never_run(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the names of the chips without a report from hardware, by their backend."""
    real = [run for run in runs if run.folder == "hardware"]
    seen = {chip.name for run in real for one in devices(run.report) if (chip := chip_of(one))}
    names: dict[str, list[str]] = {}
    for chip in known_chips():
        if chip.name not in seen:
            names.setdefault(chip.backend, []).append(chip.name)
    return names


def run_row(run: Run, words: Words, root: Path, speeds: Mapping[tuple[str, str], Speed]) -> str:
    """Return a report's line of the table."""
    report = run.report
    versions = f"mst {report['mst_version']}, torch {report['versions']['torch']}"
    link = f"[{report['date'][:10]}]({run.path.relative_to(root).as_posix()}), {versions}"
    counts = " / ".join(str(report["counts"].get(key, 0)) for key in ("pass", "fail", "skip"))
    status = words.hardware if run.folder == "hardware" else words.simulated
    speed = speed_text(run, speeds, words, root)
    return _row(label(devices(report)), f"`{report['backend']}`", status, link, counts, speed)


def table(
    runs: Sequence[Run], words: Words, root: Path, speeds: Mapping[tuple[str, str], Speed]
) -> str:
    """Return the support table in one language, with what its words mean below."""
    lines = [_row(*words.head), _row(*["---"] * len(words.head))]
    lines += [run_row(run, words, root, speeds) for run in newest(runs)]
    for backend, names in sorted(never_run(runs).items()):
        lines.append(_row(", ".join(names), f"`{backend}`", words.never, "", "", ""))
    lines.append(_row(words.other, words.vendor, words.never, "", "", ""))
    return "\n".join([*lines, "", words.notes])


def _row(*cells: str) -> str:
    plain = (cell.replace("\n", " ").replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(plain) + " |"


def with_table(text: str, made: str) -> str:
    """Return a README with the table between its markers.

    Raises:
        MstError: the markers are not there once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise MstError(f"the README needs {BEGIN} and {END} once each; the table goes between.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def documents(root: Path = ROOT) -> dict[str, str]:
    """Return what both READMEs should be, by their name."""
    runs, speeds = read_runs(root / RESULTS), read_speeds(root / RESULTS)
    return {
        name: with_table(
            (root / name).read_text(encoding="utf-8"), table(runs, words, root, speeds)
        )
        for name, words in WORDS.items()
    }


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write both READMEs; with --check write nothing, and return 1 when one differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are fresh")
    check = parser.parse_args(argv).check
    try:
        made = documents(root)
    except MstError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    stale = [name for name, text in made.items() if (root / name).read_text("utf-8") != text]
    for name in stale:
        if check:
            print(f"{name}: the support table is stale. Run: python ci/make_support_table.py")
        else:
            (root / name).write_text(made[name], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
