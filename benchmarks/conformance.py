"""Run the conformance kit on this machine's CPU and on both simulated chips, and keep the reports.

From the root of the repository, all cases or some: `python -m benchmarks.conformance [cpu …]`.
One JSON line a case. The support table is made from the reports: `ci/make_support_table.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.simulated import simchip_environment
from tests.simulated_ascend import ascend_environment

from mst.conformance.report import read_report

RESULTS = Path(__file__).parent / "results"
# Copies between devices, collectives and a worker that sees less than all need two.
DEVICES = 2
# Of the 910B3 that the recorded npu-smi shows; more than this machine may have, and untouched.
ASCEND_MEMORY = {"SIMCHIP_MEMORY_BYTES": str(64 * 2**30)}


@dataclass(frozen=True)
class Case:
    """A backend to check.

    Attributes:
        backend: as in `--device`.
        folder: "hardware" or "simulated", in `RESULTS`.
        environment: makes the variables of a shell on that machine, given an empty directory.
    """

    backend: str
    folder: str
    environment: Callable[[Path], dict[str, str]]


CASES = (
    Case("cpu", "hardware", lambda root: dict(os.environ)),
    Case("simchip", "simulated", lambda root: simchip_environment(devices=DEVICES)),
    Case("ascend", "simulated", lambda root: ascend_environment(root, DEVICES, **ASCEND_MEMORY)),
)


def run_case(case: Case, results: Path = RESULTS) -> dict[str, object]:
    """Return the line of one case; its report is in `results`, named by its date."""
    folder = results / case.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mst-conformance-") as directory:
        root, written = Path(directory, "root"), Path(directory, "report.json")
        root.mkdir()
        command = [sys.executable, "-m", "mst", "backend", "check", case.backend]
        done = subprocess.run(
            [*command, "--output", str(written)],
            env=case.environment(root),
            stdout=sys.stderr,
            check=False,
        )
        if not written.exists():
            return {"case": case.backend, "exit_code": done.returncode, "report": None}
        report = read_report(written)
        # The date that stands in the report, whatever the day is by now.
        path = folder / f"{report['date'][:10]}-{case.backend}.json"
        path.write_bytes(written.read_bytes())
    failed = [one["id"] for one in report["checks"] if one["status"] == "fail"]
    return {
        "case": case.backend,
        "exit_code": done.returncode,
        "report": str(path.relative_to(results.parent.parent)),
        "counts": report["counts"],
        "failed": failed,
        "seconds": round(sum(one["seconds"] for one in report["checks"]), 1),
    }


def main() -> int:
    """Run the cases that were named; 1 when a check of any failed."""
    names = [case.backend for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"some of {', '.join(names)}")
    wanted = parser.parse_args().case or names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"no case {unknown[0]!r} (there are {', '.join(names)})")
    worst = 0
    for case in CASES:
        if case.backend in wanted:
            line = run_case(case)
            print(json.dumps(line), flush=True)
            worst = max(worst, int(line["exit_code"] != 0))
    return worst


if __name__ == "__main__":
    sys.exit(main())
