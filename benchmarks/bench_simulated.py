"""`mst bench` on this machine with simulated chips plugged in, under a vendor's name and as npu.

`python -m benchmarks.bench_simulated [options of mst bench merge]`: beside the CPU, a SimChip of
tests/vendor and an Ascend 910B3 that is simulated too take part. A process has one kind of
simulated chip, so each has a matrix of its own (ci/bench.yaml, ci/bench-npu.yaml), and the results
are merged. Their speeds are those of this machine's cores, and say nothing about any chip.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.simulated import simchip_environment
from tests.simulated_ascend import ascend_environment

CI = Path(__file__).resolve().parents[1] / "ci"


def main(options: list[str]) -> int:
    """Run both matrices and merge; return the worst exit code."""
    with tempfile.TemporaryDirectory(prefix="mst-bench-") as text:
        place = Path(text)
        machines = {
            "bench.yaml": simchip_environment(),
            "bench-npu.yaml": ascend_environment(place / "npu", devices=1),
        }
        codes = [
            mst("bench", str(CI / name), "--output-dir", str(place / name), environ=environ)
            for name, environ in machines.items()
        ]
        files = [str(place / name / "results.json") for name in machines]
        codes.append(mst("bench", "merge", *files, *options, environ=dict(os.environ)))
    return max(codes)


def mst(*arguments: str, environ: dict[str, str]) -> int:
    """Run a command of mst and return its exit code."""
    command = [sys.executable, "-m", "mst", *arguments]
    return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
