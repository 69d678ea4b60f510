"""Work whose memory goes with its process."""

from __future__ import annotations

import subprocess
import sys

import psutil

SEALED = """
import sys, time
from mst.apart import apart
from mst.errors import DataError
from mst.seal.jail.seal import OFF, Seal, entered
entered(Seal(OFF, reason="a test"))

def imports():
    import decimal
    return {"answer": str(decimal.Decimal(6) * 7)}

print(apart(imports), "decimal" in sys.modules)

def fails():
    raise DataError("there are no rows.")

try:
    apart(fails)
except DataError as error:
    print(type(error).__name__, error, error.exit_code)

def has_a_bug():
    return {"answer": 1 / 0}

try:
    apart(has_a_bug)
except SystemExit as error:
    print("ended", error.code)
"""
STOPPED = """
import os, signal, sys, time
from mst.apart import apart
from mst.seal.jail.seal import OFF, Seal, entered
from mst.serve.http.listening import told_to_end
entered(Seal(OFF, reason="a test"))

def lasts():
    print(os.getpid(), flush=True)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
    return {}

with told_to_end():
    apart(lasts)
"""
UNSEALED = """
import sys
from mst.apart import apart

def imports():
    import decimal
    return {}

print(apart(imports), "decimal" in sys.modules)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_what_work_returns_or_raises_comes_back_and_what_it_imports_does_not() -> None:
    done = run(SEALED)

    assert done.stdout.splitlines() == [
        "{'answer': '42'} False",
        "DataError there are no rows. 1",
        "ended 1",
    ]
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr


def test_who_ends_the_command_ends_its_work() -> None:
    done = run(STOPPED)

    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int(done.stdout))


def test_in_a_program_that_calls_mst_nothing_is_forked() -> None:
    assert run(UNSEALED).stdout == "{} True\n"
