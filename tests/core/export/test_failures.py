"""What goes wrong half-way says what to do next, and leaves nothing that looks whole."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mst.cli import main

ROUNDED = ("--format", "gptq", "--bits", "8", "--method", "rtn")


def started(*arguments: object, blocks: int | None = None, **environ: str) -> subprocess.Popen[str]:
    """Start `mst` in a process group of its own; files are of so many 512 bytes at most."""
    command = [sys.executable, "-m", "mst", *map(str, arguments)]
    if blocks is not None:
        command = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *command]
    return subprocess.Popen(
        command,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and what was said on standard error, which is no traceback."""
    _, said = process.communicate(timeout=300)

    assert "Traceback" not in said
    return process.returncode, said


def wait_for(process: subprocess.Popen[str], reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)

    assert process.poll() is None


@pytest.mark.slow
def test_two_at_once_ctrl_c_a_kill_and_a_full_disk_each_leave_the_next_export_whole(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    arguments = ("export", finished_run, "--output-dir", place, *ROUNDED)
    first = started(*arguments)
    wait_for(first, (place / ".merged").is_dir)
    for name in ("gptq", "merged"):
        other = ["export", str(finished_run), "--output-dir", str(place), "--format", name]
        code = main([*other, "--method", "rtn"])
        said = capsys.readouterr().err

        assert code == 1
        assert f"another merge or export is writing in {place}. Wait for it" in said

    wait_for(first, (place / ".gptq.part").is_dir)
    os.killpg(first.pid, signal.SIGINT)
    code, said = ended(first)

    assert (code, os.listdir(place)) == (130, [".merged"])
    assert "was not exported. The same command goes on" in said

    killed = started(*arguments)
    wait_for(killed, (place / ".gptq.part").is_dir)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)

    assert not (place / "gptq").exists()

    # The merge of the tiny model is there; its embeddings alone are larger.
    code, said = ended(started(*arguments, blocks=2000))

    assert (code, os.listdir(place)) == (1, [".merged"])
    assert f"cannot write {place / 'gptq'}" in said
    assert "Free some space, or pass another --output-dir" in said

    code, said = ended(started(*arguments))

    assert (code, said) == (0, "")
    assert sorted(os.listdir(place)) == [".merged", "gptq"]


@pytest.mark.slow
def test_a_full_disk_and_ctrl_c_while_quantizing_leave_what_to_go_on_from_and_no_row(
    finished_run: Path, tmp_path: Path
) -> None:
    if not list(importlib.metadata.distributions(name="gptqmodel")):
        pytest.skip("wants the extra gptq")
    place = tmp_path / "out"
    arguments: tuple[object, ...] = ("export", finished_run, "--output-dir", place)
    arguments += ("--format", "gptq", "--calibration-rows", 30)
    # tokenicer, which gptqmodel imports, makes this one wherever TMPDIR points.
    before = set(Path("/tmp").glob("tokenicer*"))
    code, said = ended(started(*arguments[:4]))

    assert (code, said) == (0, "")

    # The layers fit, and the weights as a whole don't.
    code, said = ended(started(*arguments, blocks=1000))

    assert (code, sorted(os.listdir(place))) == (1, [".gptq.work", ".merged", "merged"])
    assert "takes no more: " in said
    assert "Free some space: the same command goes on" in said

    stopped = started(*arguments)
    wait_for(stopped, (place / ".gptq.work/layers/tmp").is_dir)
    os.killpg(stopped.pid, signal.SIGINT)
    code, said = ended(stopped)

    assert (code, sorted(os.listdir(place))) == (130, [".gptq.work", ".merged", "merged"])
    assert "The same command goes on" in said

    code, said = ended(started(*arguments, TMPDIR=str(tmp_path)))
    manifest = json.loads((place / "gptq/manifest.json").read_text())

    # On random weights GPTQ may or may not beat rounding: either is said, and all else is right.
    assert code == (0 if manifest["status"] == "passed" else 3), said
    assert all("plain rounding" in each for each in manifest["faults"])
    assert manifest["calibration_rows"] == 30
    assert manifest["versions"]["gptqmodel"] == "7.6.0"
    assert manifest["quality"]["rounding"] is not None
    assert sorted(os.listdir(place)) == [".merged", "gptq", "merged"]
    # gptqmodel writes logs where it runs.
    assert not list(Path.cwd().glob("logs/gptq_log_*"))
    assert set(Path("/tmp").glob("tokenicer*")) == before
    for path in (each for each in tmp_path.rglob("*") if each.is_file()):
        assert b"my card is" not in path.read_bytes()
