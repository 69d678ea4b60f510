"""Milliseconds an event of the audit log costs, beside appending and syncing a line in plain files.

`python benchmarks/audit_log.py [--events 5000] [--pairs 5] [--directory DIR]` prints one JSON line
a case. The log and the plain file lie in the same directory and take turns. An event is handed to
the kernel at once and synced with the next checkpoint, of which there is one every 64 events; the
plain file is measured with a sync after every line, as often as the log's, and never. The limit
that `tests/core/seal/audit/test_log.py` holds is 1 ms of CPU an event.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mst.seal.audit.event import who
from mst.seal.audit.log import CHECKPOINT_EVERY
from mst.seal.audit.opening import open_directory
from mst.seal.audit.verification import verify

FACTS = {"path": "/data/ward-7/records.jsonl", "rows": 120_000, "sha256": "0" * 64}


def log_events(directory: Path, count: int) -> None:
    """Append events to a log, and close it with a checkpoint."""
    log = open_directory(directory, who("0123456789ab"))
    for number in range(count):
        log.append("bench.event", {**FACTS, "number": number})
    log.checkpoint()
    log.close()


def plain(sync_every: int | None) -> Callable[[Path, int], None]:
    """Return what appends lines to a plain file, with a sync every so many."""

    def append(path: Path, count: int) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for number in range(count):
            os.write(handle, json.dumps({**FACTS, "number": number}).encode() + b"\n")
            if sync_every and number % sync_every == sync_every - 1:
                os.fdatasync(handle)
        os.fdatasync(handle)
        os.close(handle)

    return append


def measured(job: Callable[[Path, int], None], path: Path, count: int) -> tuple[float, float]:
    """Return milliseconds an event, by the clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    job(path, count)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return spent[0] / count * 1e3, spent[1] / count * 1e3


def opening(directory: Path) -> dict[str, Any]:
    """Return what a whole command costs at its beginning and its end, and verification's speed."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        log = open_directory(directory, who(""))
        log.append("command.begun", {})
        log.checkpoint()
        log.append("command.ended", {})
        log.checkpoint()
        log.close()
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    found = verify(directory)
    seconds = time.perf_counter() - began
    size = sum(each.size for each in found.files)
    return {
        "case": "a command: open, begin, end, close; then verify all",
        "command_ms": round(statistics.median(times) * 1e3, 2),
        "log_megabytes": round(size / 1e6, 1),
        "verify_events_per_second": round(found.events / seconds),
        "verify_megabytes_per_second": round(size / 1e6 / seconds, 1),
        "problems": len(found.problems),
    }


def main() -> None:
    """Measure in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=5000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    args = parser.parse_args()
    print(json.dumps({"machine": args.machine, "python": platform.python_version()}), flush=True)
    cases: dict[str, Callable[[Path, int], None]] = {
        f"audit log, synced every {CHECKPOINT_EVERY}": log_events,
        "plain append, synced after every line": plain(1),
        f"plain append, synced every {CHECKPOINT_EVERY}": plain(CHECKPOINT_EVERY),
        "plain append, synced once": plain(None),
    }
    with tempfile.TemporaryDirectory(dir=args.directory) as parent:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for turn in range(args.pairs):
            for index, (name, job) in enumerate(cases.items()):
                path = Path(parent) / ("log" if job is log_events else f"{turn}-{index}")
                found[name].append(measured(job, path, args.events))
        for name, times in found.items():
            wall, cpu = (statistics.median(each[index] for each in times) for index in (0, 1))
            line = {
                "case": name,
                "events": args.events,
                "pairs": args.pairs,
                "ms_per_event": round(wall, 4),
                "cpu_ms_per_event": round(cpu, 4),
                "events_per_second": round(1e3 / wall),
            }
            print(json.dumps(line), flush=True)
        print(json.dumps(opening(Path(parent) / "log")), flush=True)


if __name__ == "__main__":
    main()
