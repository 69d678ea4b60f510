"""What the kit's parts for one plugin share: checks in a process of their own, a line for each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from mst.conformance.findings import FAIL, SKIP, Finding, Result, failed
from mst.conformance.processes import ending, start, wait
from mst.errors import MstError

T = TypeVar("T")
# Id, the promise, and what tries it.
Checks = Sequence[tuple[str, str, Callable[[T], Finding]]]


def results_of(
    module: str,
    arguments: Sequence[str],
    lines: Path,
    checks: Checks[T],
    seconds: float,
    advice: str,
) -> list[Result]:
    """Run checks in a process of their own and return a result for each.

    Args:
        module: is run with `arguments`, and calls `write_results`.
        arguments: of the process.
        lines: the file that it writes.
        checks: all of them; one that was not reached is skipped.
        seconds: after which the process is ended.
        advice: where it ended in the middle of a check.
    """
    ended = wait(start(module, list(arguments), os.environ), seconds)
    found: dict[str, Result] = {}
    with suppress(OSError):
        for line in lines.read_text(encoding="utf-8").splitlines():
            result = Result(**json.loads(line))
            found[result.id] = result
    why = ending(ended, seconds)
    results: list[Result] = []
    for check, title, _ in checks:
        if check in found:
            results.append(found[check])
        elif why:
            results.append(Result(check, title, FAIL, f"the process {why}", advice, {}, 0.0))
            why = ""
        else:
            results.append(Result(check, title, SKIP, "not reached", "", {}, 0.0))
    return results


def write_results(checks: Checks[T], trial: T, needed: Sequence[str], lines: Path) -> None:
    """Run checks in order and write a line of JSON for each, before the next begins.

    Args:
        checks: in their order.
        trial: what each is given.
        needed: ids of those without which no other can be tried.
        lines: the file; it is appended to.
    """
    with lines.open("a", encoding="utf-8") as file:
        for check, title, function in checks:
            began = time.monotonic()
            try:
                finding = function(trial)
            except MstError as error:
                finding = failed(f"{type(error).__name__}: {error}", "mend what it says")
            except Exception as error:  # whatever a plugin raises
                place = f"{type(error).__name__}: {str(error)[:200]}"
                finding = failed(place, "raise an MstError for what a user can mend")
            seconds = round(time.monotonic() - began, 3)
            result = Result(
                check, title, finding.status, finding.found, finding.advice, finding.figures,
                seconds,
            )  # fmt: skip
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            if finding.status == FAIL and check in needed:
                break
