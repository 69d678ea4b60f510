"""Run checks in this process and report each as a line of JSON on an inherited pipe.

Run as `python -m mst.conformance.worker WORKSPACE PIPE '["id", …]' '["failed id", …]'`.
Lines: {"begin": id}, {"at": what runs}, {"end": id, "finding": …}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mst import serial
from mst.conformance.checks import ACTIVATION, DEVICE, Check, by_id, function_of
from mst.conformance.findings import FAIL, Context, Finding, failed, skipped
from mst.conformance.processes import first_line
from mst.conformance.subject import Subject, own_registry
from mst.errors import MstError
from mst.probe import activate

Tell = Callable[[dict[str, Any]], None]


def run_check(
    check: Check, context: Context, broken: set[str], before: Callable[[], None]
) -> Finding:
    """Return what a check found; whatever it raises is a failure.

    Args:
        check: what to run.
        context: what it is given.
        broken: ids of checks that failed.
        before: what it needs done in this process.
    """
    missing = [need for need in check.needs if need in broken]
    if missing:
        return skipped(f"needs {missing[0]}, which failed")
    advice = "mend what the message names, then run this check with --only"
    try:
        before()
        return function_of(check)(context)
    except MstError as error:
        return failed(str(error), advice)
    except Exception as error:  # a vendor's kernel may raise anything anywhere
        return failed(f"{type(error).__name__}: {first_line(str(error))}", advice)


def run_all(checks: Sequence[Check], context: Context, broken: set[str], tell: Tell) -> None:
    """Run checks of one place in order, and report each before the next begins."""
    # This one activates by itself, to see that it can be done twice.
    active = checks[0].id == "activation.repeats" or checks[0].place != DEVICE

    def activated() -> None:
        nonlocal active
        if not active:
            context.at(ACTIVATION)
            activate(own_registry(context.subject), context.subject.name)
            active = True

    for check in checks:
        tell({"begin": check.id})
        began = time.perf_counter()
        finding = run_check(check, context, broken, activated)
        if finding.status == FAIL:
            broken.add(check.id if active else "activation.repeats")
        seconds = time.perf_counter() - began
        tell({"end": check.id, "finding": serial.to_json(finding), "seconds": seconds})


def main(arguments: list[str]) -> int:
    """Run the named checks."""
    workspace = Path(arguments[0])
    checks = [by_id(each) for each in json.loads(arguments[2])]
    broken = set(json.loads(arguments[3]))
    with os.fdopen(int(arguments[1]), "w", buffering=1, encoding="utf-8") as pipe:

        def tell(line: dict[str, Any]) -> None:
            pipe.write(json.dumps(line, ensure_ascii=False) + "\n")

        subject = serial.load(Subject, workspace / "subject.json")
        context = Context(subject, workspace, lambda what: tell({"at": what}))
        run_all(checks, context, broken, tell)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # A vendor's library may crash or hang while Python shuts down; every finding is written.
    os._exit(code)
