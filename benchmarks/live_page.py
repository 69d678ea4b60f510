"""What `mst ui` costs a run that it shows, and how soon it shows a thousand runs.

`python -m benchmarks.live_page` prints one JSON line a case. "training": a run of SmolLM2-135M, in
which every other stretch of steps is watched (alone, watched, watched, alone, …), so that what else
moves a machine's speed meets both sides alike; a ratio is that of two neighbours' tokens a second.
Beside it stands what the page's processes used of the processors once the page was open, which a
busy machine changes little. `--viewer chromium` watches in a headless Chromium on the same machine,
whose own time is told apart; `stream` takes the stream as a browser does, and draws nothing.
"first_paint": `--runs` runs of `--points` steps in Chromium, until the first paint, until the list
is there, and until the curves of a run are drawn.

"accessibility": what axe-core finds in each part of the page, in both languages and on two sizes of
screen; needs `npm ci` in tests/core/ui.

Bars: less than 1 % of the tokens a second, a first paint within 1 s, and nothing serious found.
Chromium needs the package `playwright`, and a Chromium of the system.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from mst import rundir
from mst.ui.index import id_of

QUIET = 0.05
# Steps at the beginning of a stretch that are not counted.
OPENING = 2
AXE = Path(__file__).parents[1] / "tests/core/ui/node_modules/axe-core/axe.min.js"
SCREENS = {"phone": {"width": 360, "height": 740}, "desktop": {"width": 1280, "height": 900}}
PARTS = ("", "run/{}", "start", "machine")
Watch = Callable[[], contextlib.AbstractContextManager[None]]


class Server:
    """A page's server, entered."""

    def __init__(self, runs: Path, home: Path) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mst", "ui", "--runs", str(runs), "--audit-log",
             str(home / "audit")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.link = next(
            line.split()[1] for line in self._process.stdout if line.startswith("page ")
        )
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        self.base, _, self.token = self.link.replace("/enter", "").partition("#")
        self.port = int(self.base.rpartition(":")[2].strip("/"))

    def seconds(self) -> float:
        """Return the processor seconds of all of its processes so far."""
        top = psutil.Process(self._process.pid)
        return processor_seconds([top, *top.children(recursive=True)])

    def end(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


def processor_seconds(processes: list[psutil.Process], name: str = "") -> float:
    """Return the processor seconds of those processes whose name has a text."""
    found = 0.0
    for each in processes:
        with contextlib.suppress(psutil.Error):
            if name in each.name():
                times = each.cpu_times()
                found += times.user + times.system
    return found


@contextlib.contextmanager
def streaming(server: Server, run: Path) -> Iterator[None]:
    """Take a run's stream as a browser does, and ask for the list as often as it does."""
    made = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Origin": server.base.rstrip("/"), "Content-Type": "application/json"}
    made.request("POST", "/api/session", json.dumps({"token": server.token}), headers)
    reply = made.getresponse()
    cookie = (reply.getheader("Set-Cookie") or "").partition(";")[0]
    reply.read()
    ended = threading.Event()

    def take() -> None:
        while not ended.is_set():
            stream = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            stream.request("GET", f"/api/runs/{id_of(run)}/live", headers={"Cookie": cookie})
            found = stream.getresponse()
            while found.status == 200 and not ended.is_set() and found.readline():
                pass
            stream.close()
            ended.wait(1.0)

    threading.Thread(target=take, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless Chromium."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as begun:
        browser = begun.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


def training_command(run: Path, steps: int) -> list[str]:
    """Return the command that trains the demo's model."""
    return [
        sys.executable, "-m", "mst", "train", "--output-dir", str(run), "--device", "cpu",
        "--max-steps", str(steps), "--label-accuracy", "off", "--val-size", "0",
        "--logging-steps", "1",
    ]  # fmt: skip


@contextlib.contextmanager
def viewers(server: Server, run: Path, viewer: str) -> Iterator[Watch]:
    """Yield what watches a run for as long as it is entered."""
    if viewer == "stream":
        yield lambda: streaming(server, run)
        return
    with chromium() as browser:
        page = browser.new_page()
        page.goto(server.link)
        page.locator("#main h1").wait_for()

        @contextlib.contextmanager
        def shown() -> Iterator[None]:
            page.goto(f"{server.base}#/run/{id_of(run)}")
            yield
            page.goto("about:blank")

        page.goto("about:blank")
        yield shown


def speeds(lines: list[dict[str, Any]], length: int) -> list[float]:
    """Return each stretch's tokens a second, without its first steps: there the page is opened."""
    before = [0, *(each["tokens"] for each in lines)]
    tokens = [each["tokens"] - earlier for each, earlier in zip(lines, before, strict=False)]
    found = []
    for first in range(0, len(lines), length):
        part = range(first + OPENING, first + length)
        seconds = sum(tokens[step] / lines[step]["tokens_per_second"] for step in part)
        found.append(sum(tokens[step] for step in part) / seconds)
    return found


def _browser_seconds() -> float:
    """Return the processor seconds of the browsers that this process has started."""
    return processor_seconds(psutil.Process().children(recursive=True), "chrom")


def training(pairs: int, length: int, viewer: str) -> dict[str, Any]:
    """Return the figures of a run that is watched in one stretch of each pair."""
    watched = [number % 4 in (1, 2) for number in range(2 * pairs)]
    used = {"server": 0.0, "browser": 0.0}
    seconds = 0.0
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as held:
        home, run = Path(name), Path(name) / "runs" / "run"
        run.parent.mkdir()
        server = Server(run.parent, home)
        held.callback(server.end)
        watch = held.enter_context(viewers(server, run, viewer))
        warm = length
        steps = warm + length * len(watched)
        worker = subprocess.Popen(training_command(run, steps), stdout=subprocess.DEVNULL)
        held.callback(worker.terminate)
        curve = run / rundir.METRICS
        _wait_for(curve, warm, worker)
        for number, looks in enumerate(watched):
            end = warm + (number + 1) * length
            if not looks:
                _wait_for(curve, end, worker)
                continue
            with watch():
                _wait_for(curve, end - length + OPENING, worker)
                before, began = (server.seconds(), _browser_seconds()), time.monotonic()
                _wait_for(curve, end, worker)
                seconds += (time.monotonic() - began) * (os.cpu_count() or 1)
                used["server"] += server.seconds() - before[0]
                used["browser"] += _browser_seconds() - before[1]
        if worker.wait():
            raise SystemExit(f"the run ended with {worker.returncode}")
        found = speeds(_lines(curve)[:steps], length)[1:]
    sides = {
        side: [speed for speed, looks in zip(found, watched, strict=True) if looks == at]
        for side, at in (("alone", False), ("watched", True))
    }
    ratios = [one / other for one, other in zip(sides["watched"], sides["alone"], strict=True)]
    return {
        "case": "training", "viewer": viewer, "pairs": pairs, "steps_a_stretch": length,
        **{side: statistics.median(each) for side, each in sides.items()},
        **{f"{name}_share": each / seconds for name, each in used.items()},
        "ratio": statistics.mean(ratios),
        "ratio_standard_error": statistics.stdev(ratios) / pairs**0.5,
        "ratios": [round(each, 4) for each in ratios],
    }  # fmt: skip


def _lines(curve: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        # The last line may be half-written.
        return [json.loads(line) for line in curve.read_text().split("\n")[:-1]]
    return []


def _wait_for(curve: Path, step: int, worker: subprocess.Popen[bytes]) -> None:
    """Wait until a run has taken so many steps, with as little work as can be."""
    while len(_lines(curve)) < step and worker.poll() is None:
        time.sleep(0.5)


def make_runs(root: Path, source: Path, runs: int, points: int) -> None:
    """Make many runs of one that is finished, each with a long curve."""
    lines = [
        {"step": step, "epoch": 0.0, "loss": 3 / (1 + step / 500) + (step * 7919 % 101) / 500,
         "learning_rate": 1e-4 * (1 - step / points), "grad_norm": 1.0, "tokens": step * 900,
         "tokens_per_second": 740.0 + step * 31 % 17, "memory_bytes": 1 << 31}
        for step in range(1, points + 1)
    ]  # fmt: skip
    curve = root.parent / "metrics.jsonl"
    curve.write_text("".join(json.dumps(each) + "\n" for each in lines))
    manifest = json.loads((source / rundir.MANIFEST).read_text())
    for number in range(runs):
        run = root / f"run-{number:04}"
        run.mkdir(parents=True)
        created = f"2026-01-{1 + number % 28:02}T{number % 24:02}:00:00+00:00"
        (run / rundir.MANIFEST).write_text(json.dumps(manifest | {"created": created}))
        for name in (rundir.PLAN, rundir.REQUEST):
            os.link(source / name, run / name)
        # One file behind all: what is read is the same, and the disk needs 2 MB and not 2 GB.
        os.link(curve, run / rundir.METRICS)


def first_paint(runs: int, points: int) -> dict[str, Any]:
    """Return the seconds until the first paint, the list, and a run's curves."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        subprocess.run(training_command(home / "source", 2), stdout=subprocess.DEVNULL, check=True)
        make_runs(home / "runs", home / "source", runs, points)
        server = Server(home / "runs", home)
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(server.link)
            page.locator("table.runs tbody tr").first.wait_for()
            found: list[tuple[float, float, float]] = []
            for _ in range(5):
                page.goto("about:blank")
                began = time.monotonic()
                page.goto(server.base)
                page.locator("table.runs tbody tr").nth(min(runs, 50) - 1).wait_for()
                listed = time.monotonic() - began
                painted = page.evaluate(
                    "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
                )
                began = time.monotonic()
                page.locator("table.runs a").nth(len(found)).click()
                page.locator("figure canvas").nth(3).wait_for()
                found.append((painted, listed, time.monotonic() - began))
        server.end()
    names = ("first_paint_seconds", "list_seconds", "curves_seconds")
    medians = dict(zip(names, map(statistics.median, zip(*found, strict=True)), strict=True))
    worst = {f"worst_{name}": max(each) for name, each in zip(names, zip(*found, strict=True),
                                                             strict=True)}  # fmt: skip
    return {"case": "first_paint", "runs": runs, "points": points, **medians, **worst}


def accessibility() -> dict[str, Any]:
    """Return how many faults of each weight axe-core finds, and their rules."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        command = training_command(home / "runs" / "run", 4)
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        server = Server(home / "runs", home)
        with chromium() as browser:
            page = browser.new_page()
            page.goto(server.link)
            page.locator("table.runs tbody tr").first.wait_for()
            for language, screen, part in itertools.product(("en", "zh"), SCREENS, PARTS):
                page.set_viewport_size(SCREENS[screen])
                page.goto("about:blank")
                page.goto(
                    f"{server.base}/?lang={language}#/{part.format(id_of(home / 'runs/run'))}"
                )
                page.locator("#main h2, table.runs tbody tr").last.wait_for()
                page.wait_for_timeout(1000)
                page.evaluate(AXE.read_text(encoding="utf-8"))
                told = page.evaluate("axe.run(document)")
                weights: dict[str, list[str]] = {}
                for each in told["violations"]:
                    weights.setdefault(each["impact"], []).append(each["id"])
                rules = {"passed": len(told["passes"]), "violations": weights}
                found[f"{part.partition('/')[0] or 'list'} {language} {screen}"] = rules
                version = told["testEngine"]["version"]
        server.end()
    return {"case": "accessibility", "axe_core": version, "parts": found}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    cases = ("training", "first_paint", "accessibility")
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases[:2])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12, help="of each stretch")
    parser.add_argument("--viewer", choices=("stream", "chromium"), default="chromium")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--points", type=int, default=10_000)
    args = parser.parse_args()
    from mst.bench.meters import busy_share

    for case in args.cases:
        busy = busy_share()
        if case == "training":
            line = training(args.pairs, args.steps, args.viewer)
        elif case == "first_paint":
            line = first_paint(args.runs, args.points)
        else:
            line = accessibility()
        print(json.dumps({**line, "busy_before": busy, "quiet": busy < QUIET}), flush=True)


if __name__ == "__main__":
    main()
