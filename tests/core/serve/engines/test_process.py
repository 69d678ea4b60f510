"""An engine as a supervised process, with a real one that can be made to misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mst.serve.engines import EngineCommand
from mst.serve.engines.last_words import LastWords
from mst.serve.engines.leftovers import end_session, session
from mst.serve.engines.process import EngineEnded, Patience, Supervised, engine_environment
from mst.serve.engines.upstream import Address

SERVER = Path(__file__).parents[3] / "vendor" / "parrot" / "parrot_server.py"
QUICK = Patience(
    look_seconds=0.05, health_seconds=0.1, wait_seconds=0.05, failures=3, end_seconds=2
)


def wait_for(found: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def said() -> list[str]:
    """What the supervisor has said."""
    return []


@pytest.fixture
def parrot(notes: Path, said: list[str]) -> Iterator[Supervised]:
    """The engine, not yet started."""
    place = str(notes / "socket")
    command = EngineCommand(
        (sys.executable, str(SERVER), "/models/m", place, "m"), {"PARROT_NOTES": str(notes)}
    )
    made = Supervised(
        "parrot", command, Address(socket=place), os.environ, said.append,
        lambda: said.append("given up"), QUICK,
    )  # fmt: skip
    yield made
    made.close()


def kill(engine: Supervised) -> int:
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_killed_engine_is_unready_at_once_and_started_again(
    parrot: Supervised, said: list[str]
) -> None:
    parrot.start()
    assert parrot.well()

    pid = kill(parrot)
    wait_for(lambda: parrot.state != "ready", seconds=1)

    assert not parrot.well()
    wait_for(parrot.well)
    assert (parrot.pid != pid, parrot.restarts) == (True, 1)
    assert said[0] == "parrot ended by SIGKILL; it is started again"
    assert said[1].startswith("parrot answers again after ")


def test_an_engine_that_keeps_ending_is_given_up(parrot: Supervised, said: list[str]) -> None:
    parrot.start()
    for _ in range(QUICK.failures):
        wait_for(parrot.well)
        parrot.asked()
        kill(parrot)
        wait_for(lambda: parrot.state != "ready")
    wait_for(lambda: parrot.state == "failed")

    assert parrot.failure == "parrot ended by SIGKILL, 3 times in a row, and is given up."
    wait_for(lambda: said[-1] == "given up")


def test_an_engine_that_cannot_load_ends_with_its_own_words(
    parrot: Supervised, notes: Path
) -> None:
    (notes / "cannot").touch()

    with pytest.raises(EngineEnded, match=r"(?s)code 1 while it was loading .*no weights"):
        parrot.start()


def test_a_program_that_is_not_there_is_said(notes: Path) -> None:
    engine = Supervised(
        "gone", EngineCommand((str(notes / "bin" / "gone"),)), Address(socket=str(notes / "s")),
        os.environ, print, lambda: None, QUICK,
    )  # fmt: skip

    with pytest.raises(EngineEnded, match="bin/gone can't be started: No such file"):
        engine.start()


def test_an_engine_that_hangs_is_started_again(parrot: Supervised, said: list[str]) -> None:
    parrot._patience = Patience(
        look_seconds=0.05, health_seconds=0.1, answer_seconds=0.2, misses=2, end_seconds=0.2
    )
    parrot.start()
    assert parrot.pid is not None
    os.kill(parrot.pid, signal.SIGSTOP)

    wait_for(lambda: parrot.restarts == 1)

    assert "did not answer, and was ended" in said[0]
    wait_for(parrot.well)


def test_closing_ends_the_engine_and_its_children(parrot: Supervised, notes: Path) -> None:
    parrot.start()
    pid = parrot.pid
    assert pid is not None

    parrot.close()

    assert not Path(f"/proc/{pid}").exists()
    assert parrot.state == "stopping"


def test_an_engines_workers_and_shared_memory_go_with_it(tmp_path: Path) -> None:
    # A worker that heeds no SIGTERM, and memory that nobody clears up.
    code = (
        "import os, signal, mmap, time\n"
        "file = os.open(PATH, os.O_CREAT | os.O_RDWR); os.ftruncate(file, 4096)\n"
        "held = mmap.mmap(file, 4096); held[:7] = b'patient'\n"
        "if os.fork():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(READY, 'w').close(); time.sleep(600)"
    )
    shared, ready = Path("/dev/shm/mst-test-leftover"), tmp_path / "ready"
    began = time.time()
    leader = subprocess.Popen(
        [sys.executable, "-c", f"PATH, READY = {str(shared)!r}, {str(ready)!r}\n{code}"],
        start_new_session=True,
    )
    wait_for(ready.is_file)
    assert len(session(leader.pid)) == 1

    end_session(leader.pid, frozenset(), began)

    assert session(leader.pid) == []
    assert not shared.exists()
    assert leader.wait() == -signal.SIGKILL


def test_what_is_written_after_a_request_is_not_kept() -> None:
    words = LastWords()
    words.add(b"\x1b[31mValueError: no such dtype\x1b[0m\n")
    words.add(b"loaded\n")

    assert "ValueError: no such dtype" in words.told()
    assert "\x1b" not in words.told()

    words.asked()
    words.add(b"KeyError: 'patient-4711'\n")
    words.add(b"Patient4711Error: torch.OutOfMemoryError\n")

    assert "4711" not in words.told()
    assert "KeyError, OutOfMemoryError" in words.told()
    assert "no such dtype" not in words.told()


def test_an_engines_environment_has_no_secret_and_no_way_to_a_hub() -> None:
    given = {
        "PATH": "/usr/bin", "HF_TOKEN": "hf_x", "AWS_SECRET_ACCESS_KEY": "s", "PYTHONHOME": "/p",
        "VIRTUAL_ENV": "/v", "CUDA_VISIBLE_DEVICES": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip

    found = engine_environment(given, {"MINE": "1"})

    assert given.keys() & found.keys() == {"PATH", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"}
    assert found["HF_HUB_OFFLINE"] == found["DO_NOT_TRACK"] == found["MINE"] == "1"
