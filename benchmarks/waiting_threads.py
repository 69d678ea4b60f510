"""How long OpenMP's threads should wait awake: alone, and beside other work on the same cores.

`python -m benchmarks.waiting_threads` prints one JSON line a case and way to wait: rounds a second
of the products of ten decoder layers of SmolLM2-135M's size in bfloat16, on all cores, and their
ratio to OpenMP's default. Each is a process of its own, in `--rounds` rounds of which every other
goes through the ways backwards; first alone, then beside a process for each two cores that never
rests. `mst.launch` lets workers wait for 10,000 turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

from mst.bench.meters import busy_share

DEFAULT = "default"
WAYS = {
    DEFAULT: {},
    **{turns: {"GOMP_SPINCOUNT": turns} for turns in ("1000", "10000", "100000")},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
QUIET = 0.05
TOKENS, HIDDEN, INNER, LAYERS = 1024, 576, 1536, 10


def rounds_a_second(seconds: float) -> float:
    """Compute for so long, and return how often the layers were gone through in a second."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count() or 1)
    up = torch.randn(INNER, HIDDEN, dtype=torch.bfloat16) / HIDDEN
    down = torch.randn(HIDDEN, INNER, dtype=torch.bfloat16) / INNER

    def layers() -> None:
        hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
        for _ in range(LAYERS):
            inner = functional.silu(hidden @ up.T) * (hidden @ up.T)
            hidden = hidden + functional.rms_norm(inner @ down.T, (HIDDEN,))

    for _ in range(3):
        layers()
    began, count = time.monotonic(), 0
    while time.monotonic() < began + seconds:
        layers()
        count += 1
    return count / (time.monotonic() - began)


def measured(way: str, seconds: float) -> float:
    """Return the rounds a second of a process that waits in one of `WAYS`."""
    unsaid = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    command = [sys.executable, "-m", "benchmarks.waiting_threads", "--within", str(seconds)]
    done = subprocess.run(command, env=unsaid | WAYS[way], stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure all ways, alone and beside others."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each process")
    parser.add_argument("--within", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.within:
        print(rounds_a_second(args.within))
        return
    busy = busy_share()
    cores = os.cpu_count() or 1
    facts = {
        "rounds": args.rounds, "seconds": args.seconds, "cores": cores,
        "torch": version("torch"), "python": platform.python_version(),
        "busy_before": round(busy, 3), "quiet": busy < QUIET,
    }  # fmt: skip
    for others in (0, max(1, cores // 2)):
        restless = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)
        ]
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        try:
            for number in range(args.rounds):
                for way in list(WAYS)[:: -1 if number % 2 else 1]:
                    found[way].append(measured(way, args.seconds))
        finally:
            for process in restless:
                process.kill()
                process.wait()
        usual = statistics.median(found[DEFAULT])
        for way, rates in found.items():
            rate = statistics.median(rates)
            print(json.dumps({
                "case": f"beside {others} others", "waits": way, **facts,
                "rounds_a_second": round(rate, 3), "ratio_to_default": round(rate / usual, 3),
                "all": [round(each, 3) for each in rates],
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
