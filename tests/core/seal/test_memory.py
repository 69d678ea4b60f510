"""What a process holds in memory is in no core file after it has crashed."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.canaries import STEM, canaries, leaks_in

from mst.cli import main

_PATTERN = Path("/proc/sys/kernel/core_pattern").read_text().strip()
_HARD_LIMIT = resource.getrlimit(resource.RLIMIT_CORE)[1]
_ET_CORE = b"\4\0"
# Python runs this in every process that finds it, before `mst` begins.
_UNPROTECTED = "import mst.seal.memory\nmst.seal.memory.core_dumps_off = lambda: None\n"

pytestmark = [
    pytest.mark.skipif(
        _PATTERN == "" or _PATTERN[0] in "|@/",
        reason=f"no crash leaves a core file beside it here: kernel.core_pattern is {_PATTERN!r}",
    ),
    pytest.mark.skipif(_HARD_LIMIT == 0, reason="core files are shut off for good here"),
]


def core_files(folder: Path) -> list[Path]:
    """Return the files below a folder that are dumps of a process, by whatever name."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                start = file.read(18)
            if start.startswith(b"\x7fELF") and start[16:] == _ET_CORE:
                found.append(path)
    return found


def allow_core_files() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (_HARD_LIMIT, _HARD_LIMIT))


def crash_in_training(model: Path, place: Path, first: Path) -> None:
    """Train on encrypted rows, and let the worker crash after a step.

    Args:
        model: to train.
        place: holds `rows.jsonl.mst` and `key`; the run and all else is written there.
        first: a directory of modules that are found before others.
    """
    work = place / "work"
    work.mkdir()
    options = {
        "model": model, "dataset": place / "rows.jsonl.mst", "key-file": place / "key",
        "output-dir": place / "run", "device": "cpu", "threads": 1, "max-steps": 5000,
        "save-steps": 1, "per-device-train-batch-size": 1, "gradient-accumulation-steps": 1,
        "val-size": 0.05,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    path = os.pathsep.join([str(first), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "-m", "mst", "train", *flags],
        cwd=work, env=os.environ | {"TMPDIR": str(work), "PYTHONPATH": path},
        preexec_fn=allow_core_files, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list((place / "run").glob("checkpoints/step-*/")):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (worker,) = (
            each
            for each in psutil.Process(parent.pid).children(recursive=True)
            if "mst.training.worker" in each.cmdline()
        )
        worker.send_signal(signal.SIGSEGV)
        code = parent.wait(60)
    finally:
        parent.kill()
        parent.wait()

    assert code not in (0, -signal.SIGKILL)


@pytest.fixture
def place(key_file: Path, tmp_path: Path) -> Path:
    """A directory with encrypted rows and their key."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"where is {word}", "response": word}) + "\n"
            for word in itertools.islice(canaries(), 100)
        )
    )
    assert main(["data", "encrypt", str(rows), "--key-file", str(key_file)]) == 0
    rows.unlink()
    return tmp_path


@pytest.mark.slow
def test_a_worker_with_decrypted_rows_crashes_without_a_core_file(
    tiny_model: Path, place: Path
) -> None:
    crash_in_training(tiny_model, place, place / "nothing")

    assert core_files(place) == []
    assert leaks_in([place]) == []


@pytest.mark.slow
def test_without_the_setting_the_same_worker_leaves_its_rows_in_one(
    tiny_model: Path, place: Path
) -> None:
    first = place / "first"
    first.mkdir()
    (first / "sitecustomize.py").write_text(_UNPROTECTED)
    crash_in_training(tiny_model, place, first)

    (core,) = core_files(place)
    assert STEM.encode() in core.read_bytes()
    core.unlink()


def test_what_a_command_starts_leaves_no_core_file(tmp_path: Path) -> None:
    inner = (
        "import resource, os; print(resource.getrlimit(resource.RLIMIT_CORE),"
        " open('/proc/self/coredump_filter').read().strip(), flush=True); os.abort()"
    )
    outer = (
        "import subprocess, sys; from mst import cli; cli.main(['--version']);"
        f"sys.exit(subprocess.run([sys.executable, '-c', {inner!r}]).returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", outer],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, preexec_fn=allow_core_files,
    )  # fmt: skip

    assert "(1, 1) 00000000" in done.stdout, done.stderr
    assert done.returncode == 256 - signal.SIGABRT
    assert list(tmp_path.iterdir()) == []
