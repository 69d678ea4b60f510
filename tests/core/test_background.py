"""Commands in the background. `mst plan FIFO` waits for somebody to write into it, at no cost."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mst import background
from mst.background import Work
from mst.errors import UsageError


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where a test's works are kept; what still runs there is ended."""
    place = tmp_path / "work"
    yield place
    for each in background.works(place):
        background.stop(each, kill=True)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "options.yaml"
    os.mkfifo(path)
    return path


def wait(work: Work, until: Callable[[Work], bool], seconds: float = 20) -> Work:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = background.read(work.directory)
        assert found is not None
        if until(found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"{work.name} did not come to it: {background.output(work)}")


def ended(work: Work) -> bool:
    return work.state != "running"


def test_a_command_outlives_a_killed_session_and_its_end_is_noted(place: Path, fifo: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mst import background;"
        "background.start(['plan', sys.argv[2]], place=Path(sys.argv[1]));"
        "print('started', flush=True); time.sleep(60)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(place), str(fifo)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with starter:
        assert starter.stdout is not None
        starter.stdout.readline()
        os.killpg(starter.pid, signal.SIGHUP)
        os.killpg(starter.pid, signal.SIGKILL)
    (work,) = background.works(place)

    assert work.state == "running"
    assert work.arguments == ("plan", str(fifo))
    assert work.pid is not None
    assert os.getsid(work.pid) == work.pid

    fifo.write_text("no_such_option: 1\n")
    work = wait(work, ended)

    assert (work.state, work.exit_code) == ("failed", 2)
    assert "unknown key 'no_such_option'" in background.output(work)


def test_a_command_that_succeeds_is_done(place: Path) -> None:
    work = wait(background.start(["plan", "--help"], place=place), ended)

    assert (work.state, work.exit_code) == ("done", 0)
    assert "usage: mst plan" in background.output(work)
    assert len(background.output(work, 500)) < 500


def test_a_stopped_command_is_interrupted_and_a_killed_one_says_so(place: Path, fifo: Path) -> None:
    # As in a shell's background job, where interrupts are ignored and would be inherited.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        first = background.start(["plan", str(fifo)], place=place)
    finally:
        signal.signal(signal.SIGINT, before)
    second = background.start(["plan", str(fifo)], place=place)

    assert background.stop(first)
    assert background.stop(second, kill=True)
    assert wait(first, ended).exit_code == 130
    assert wait(second, ended).exit_code == 128 + signal.SIGKILL
    assert not background.stop(first)


def test_without_its_keeper_a_command_goes_on_and_its_end_is_unknown(
    place: Path, fifo: Path
) -> None:
    work = background.start(["plan", str(fifo)], place=place)
    process = json.loads((work.directory / background.PROCESS).read_text())
    os.kill(process["keeper"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while background.identity(process["keeper"]) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert wait(work, lambda each: True).state == "running"

    background.stop(work, kill=True)

    assert wait(work, ended).state == "gone"


def test_another_process_of_the_same_number_is_neither_shown_nor_stopped(place: Path) -> None:
    work = wait(background.start(["plan", "--help"], place=place), ended)
    (work.directory / background.ENDED).unlink()
    note = json.loads((work.directory / background.PROCESS).read_text())
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        note |= {"keeper": sleeper.pid, "command": sleeper.pid}
        (work.directory / background.PROCESS).write_text(json.dumps(note))
        found = background.read(work.directory)

        assert found is not None
        assert found.state == "gone"
        assert not background.stop(found, kill=True)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_what_is_kept_is_the_users_alone(place: Path) -> None:
    work = wait(background.start(["plan", "--help"], place=place), ended)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in work.directory.iterdir()}

    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE(work.directory.stat().st_mode) == 0o700

    place.chmod(0o755)

    with pytest.raises(background.BackgroundError, match="chmod 700"):
        background.start(["plan", "--help"], place=place)


def test_commands_that_take_or_print_texts_are_refused(place: Path) -> None:
    for command in (["chat", "--prompt", "canary-prompt"], ["preview"], ["data", "check"], []):
        with pytest.raises(UsageError, match="can't go on in the background"):
            background.start(command, place=place)

    assert not place.exists()


def test_output_is_shown_without_control_characters(place: Path) -> None:
    work = wait(background.start(["plan", "--help"], place=place), ended)
    (work.directory / background.OUTPUT).write_bytes(
        b"first\n 10%\r 50%\r100%\n\x1b[31mred\x1b[0m\x1b]0;title\x07 \xe4\xb8\xad\xff\n"
    )

    assert background.output(work) == "first\n100%\nred]0;title 中\ufffd\n"
    assert background.output(work, 12) == ""


def test_a_damaged_or_foreign_directory_is_passed_over(place: Path) -> None:
    work = wait(background.start(["plan", "--help"], place=place), ended)
    (place / "empty").mkdir()
    (place / "half").mkdir()
    (place / "half" / background.WORK).write_text('{"arguments": [')

    assert [each.name for each in background.works(place)] == [work.name]
    for name in ("half", "..", "../work", ""):
        with pytest.raises(background.BackgroundError, match="nothing of that name"):
            background.find(name, place)

    background.forget(work)

    assert background.works(place) == ()
