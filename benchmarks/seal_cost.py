"""What the jail costs: seconds to enter each layer, and an optimizer step inside and outside.

One JSON line a case. Bars: 0.3 s to enter, and nothing measurable a step: the difference of the
medians lies within what repeated runs without a jail differ by.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LAYERS = ("namespace", "user", "broker", "seccomp")
ENTRIES = 9
STEPS, ROUNDS = 60, 5

_ENTER = """
import os, sys, time
from mst.seal.jail import ladder
from mst.seal.jail.seal import USER, JailRequest, Scene
layer = sys.argv[1]
if layer == "user":
    layer, ladder._MODES["namespace"] = "namespace", (USER,)
before = time.monotonic()
seal = ladder.enter(JailRequest(layer), Scene(), os.environ)
print(seal.layer, time.monotonic() - before)
"""
_STEPS = """
import os, sys, time
if sys.argv[1] != "off":
    from mst.seal.jail import ladder
    from mst.seal.jail.seal import JailRequest, Scene
    ladder.enter(JailRequest(sys.argv[1]), Scene(), os.environ)
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(8)])
optimizer = torch.optim.AdamW(model.parameters())
rows = torch.randn(64, 512)
seconds = []
for _ in range(int(sys.argv[2])):
    before = time.monotonic()
    optimizer.zero_grad()
    model(rows).square().mean().backward()
    optimizer.step()
    seconds.append(time.monotonic() - before)
print(*seconds[10:])
"""
_COLLECTIVE = """
import os, sys, time
if sys.argv[1] != "off":
    from mst.seal.jail import ladder
    from mst.seal.jail.seal import JailRequest, Scene
    ladder.enter(JailRequest(sys.argv[1]), Scene(), os.environ)
import torch
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
def rank(number, place, steps, say):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{place}", rank=number, world_size=2)
    words, seconds = torch.ones(1 << 18), []
    for _ in range(steps):
        before = time.monotonic()
        torch.distributed.all_reduce(words)
        seconds.append(time.monotonic() - before)
    if number == 0:
        print(*seconds[10:], flush=True)
first = os.fork() == 0
rank(0 if first else 1, sys.argv[3], int(sys.argv[2]), None)
if first:
    os._exit(0)
os.wait()
"""


def run(code: str, *arguments: str) -> str:
    """Run a piece of Python and return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def entering(layer: str) -> dict[str, object]:
    """Return how long it takes to enter a layer, its self-test included."""
    found = [run(_ENTER, layer).split() for _ in range(ENTRIES)]
    seconds = sorted(float(each[1]) for each in found)
    return {
        "case": f"enter {layer}",
        "layer": found[0][0],
        "median_seconds": round(statistics.median(seconds), 4),
        "worst_seconds": round(seconds[-1], 4),
        "under_0.3_s": seconds[-1] < 0.3,
    }


def stepping(name: str, code: str, steps: int) -> dict[str, object]:
    """Return the median of a step outside, in a namespace and under the broker, run in turn."""
    medians: dict[str, list[float]] = {"off": [], "namespace": [], "broker": []}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(ROUNDS):
            for layer, found in medians.items():
                place = str(Path(directory) / f"{layer}{number}")
                words = run(code, layer, str(steps), place).split()
                found.append(statistics.median(map(float, words)))
    off = medians["off"]
    answer: dict[str, object] = {
        "case": name,
        "between_runs_without": round(max(off) / min(off) - 1, 4),
    }
    for layer, found in medians.items():
        answer[f"{layer}_seconds"] = round(min(found), 6)
    return answer


def main() -> None:
    """Print the machine, then one line a case."""
    load = os.getloadavg()[0]
    print(
        json.dumps(
            {
                "kernel": platform.release(),
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
                "uid": os.geteuid(),
                "load_at_the_start": round(load, 2),
            }
        ),
        flush=True,
    )
    for layer in LAYERS:
        print(json.dumps(entering(layer)), flush=True)
    print(json.dumps(stepping("an AdamW step, 2 million weights", _STEPS, STEPS)), flush=True)
    print(
        json.dumps(stepping("all_reduce of 1 MiB, 2 ranks, gloo", _COLLECTIVE, 20 * STEPS)),
        flush=True,
    )


if __name__ == "__main__":
    main()
