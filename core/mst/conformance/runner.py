"""Run the checks in worker processes: a check that crashes or hangs takes no other with it."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mst import serial
from mst.conformance.checks import ACTIVATION, DEVICE, Check
from mst.conformance.findings import FAIL, Finding, Result, failed
from mst.conformance.processes import device_environment, ending, how, last_line, start, wait
from mst.conformance.subject import Subject
from mst.errors import MstError, UsageError

# Loading every plugin takes up to 5 s for each that hangs, and so do five hooks of this one.
_SUBJECT_SECONDS = 120.0
# Importing torch from a cold disk.
_START_SECONDS = 120.0
_ADVICE = "run this check alone with --only, under a debugger or with the vendor's own log"


@dataclass(frozen=True)
class Moment:
    """What a worker was doing: the check (None before the first), its part, and since when."""

    check: str | None
    part: str
    since: float


def find_subject(name: str, workspace: Path) -> Subject:
    """Return the backend as another process finds it, and leave it in the workspace.

    Raises:
        UsageError: no backend or plugin has that name.
        MstError: that process crashed or hung.
    """
    path = workspace / "subject.json"
    child = start("mst.conformance.subject", [name, str(path)], os.environ)
    ended = wait(child, _SUBJECT_SECONDS)
    if ended.code not in (0, 2) or not path.exists():
        raise MstError(
            f"`mst backend check {name}` could not load the plugins: the process"
            f" {ending(ended, _SUBJECT_SECONDS)}. `mst plugins` lists them; uninstall the one at"
            " fault."
        )
    if ended.code == 2:
        raise UsageError(json.loads(path.read_text(encoding="utf-8"))["error"])
    return serial.load(Subject, path)


def run_checks(
    checks: Sequence[Check],
    subject: Subject,
    workspace: Path,
    time_limit: float | None = None,
) -> Iterator[Result]:
    """Yield the result of each check as it comes, in their order.

    Args:
        checks: what to run.
        subject: the backend, from `find_subject`.
        workspace: the directory of this run of the kit.
        time_limit: seconds that a check may take, where that is less than its own limit.
    """
    broken: set[str] = set()
    for place, group in itertools.groupby(checks, lambda check: check.place):
        remaining = list(group)
        while remaining:
            count = 0
            for result in _worker(remaining, place, subject, workspace, broken, time_limit):
                if result.status == FAIL:
                    broken.add(result.id)
                count += 1
                yield result
            remaining = remaining[count:]


def _worker(
    checks: Sequence[Check],
    place: str,
    subject: Subject,
    workspace: Path,
    broken: set[str],
    time_limit: float | None,
) -> Iterator[Result]:
    """Yield one process's results: at least one; the last may be of the check that ended it."""
    reading, writing = os.pipe()
    environment = device_environment(subject.environment) if place == DEVICE else dict(os.environ)
    ids = [check.id for check in checks]
    arguments = [str(workspace), str(writing), json.dumps(ids), json.dumps(sorted(broken))]
    with tempfile.TemporaryFile("w+", errors="replace") as output, os.fdopen(reading) as pipe:
        child = subprocess.Popen(
            [sys.executable, "-m", "mst.conformance.worker", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(writing,),
            # Its own group, so that what a check has started ends with it.
            start_new_session=True,
        )
        os.close(writing)
        try:
            yield from _results(checks, child, pipe, output, broken, time_limit)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _results(
    checks: Sequence[Check],
    child: subprocess.Popen[bytes],
    pipe: IO[str],
    output: IO[str],
    broken: set[str],
    time_limit: float | None,
) -> Iterator[Result]:
    """Yield what a worker tells; adds to `broken` when it ended in its activation."""
    by_id = {check.id: check for check in checks}
    watch = [Moment(None, "", time.monotonic())]
    for line in _lines(pipe, lambda: _deadline(watch[0], by_id, time_limit)):
        now = watch[0]
        if line is None:
            broken |= _inactive(now)
            limit = _limit(now, by_id, time_limit)
            yield _stopped(now, checks, f"hangs: no end within {limit:g} s{_where(now)}")
            return
        if "begin" in line:
            watch[0] = Moment(line["begin"], "", time.monotonic())
        elif "at" in line:
            watch[0] = Moment(now.check, line["at"], now.since)
        else:
            check = by_id[line["end"]]
            yield _result(check, serial.from_json(Finding, line["finding"]), line["seconds"])
            watch[0] = Moment(None, "", time.monotonic())
            if check is checks[-1]:
                return
    # The pipe is closed although checks are left: the process has died.
    code = child.wait()
    broken |= _inactive(watch[0])
    output.seek(0)
    said = last_line(output.read())
    found = how(code) + _where(watch[0]) + (f": {said}" if said else "")
    yield _stopped(watch[0], checks, found)


def _inactive(now: Moment) -> set[str]:
    """Return what is broken when an activation, done for another check, ended the worker."""
    return {"activation.repeats"} if now.part == ACTIVATION else set()


def _where(now: Moment) -> str:
    inside = f" in {now.check}" if now.check else " before the check began"
    return inside + (f", at {now.part}" if now.part else "")


def _stopped(now: Moment, checks: Sequence[Check], found: str) -> Result:
    """Return the failure of the check that ended its process."""
    check = next((one for one in checks if one.id == now.check), checks[0])
    return _result(check, failed(found, _ADVICE), time.monotonic() - now.since)


def _result(check: Check, finding: Finding, seconds: float) -> Result:
    return Result(
        check.id,
        check.title,
        finding.status,
        finding.found,
        finding.advice,
        finding.figures,
        round(seconds, 3),
    )


def _limit(now: Moment, by_id: dict[str, Check], time_limit: float | None) -> float:
    own = by_id[now.check].seconds if now.check else _START_SECONDS
    return own if time_limit is None or not now.check else min(own, time_limit)


def _deadline(now: Moment, by_id: dict[str, Check], time_limit: float | None) -> float:
    return now.since + _limit(now, by_id, time_limit)


def _lines(pipe: IO[str], deadline: Callable[[], float]) -> Iterator[dict[str, Any] | None]:
    """Yield each line as it comes; None, and no more, when the deadline passes before the next."""
    rest = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline() - time.monotonic()))
        if not ready:
            yield None
            return
        block = os.read(pipe.fileno(), 1 << 16)
        if not block:
            return
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield json.loads(line)
