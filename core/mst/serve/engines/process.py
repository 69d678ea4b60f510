"""An engine as a supervised process: started, asked for its health, started again when it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mst.errors import MstError
from mst.launch import offline_environment
from mst.serve.engines import EngineCommand
from mst.serve.engines.last_words import LastWords
from mst.serve.engines.leftovers import SESSION_SECONDS, end_session, session, shared_memory
from mst.serve.engines.upstream import Address, answers

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
_PYTHON = re.compile(r"PYTHON(?!PATH$)|VIRTUAL_ENV|CONDA")


class EngineEnded(MstError):
    """An engine ended, and is not started again."""


@dataclass(frozen=True)
class Patience:
    """How long an engine is waited for.

    Attributes:
        load_seconds: until it takes requests.
        look_seconds: between two looks at it while it loads.
        health_seconds: between two questions for its health.
        answer_seconds: that an answer to these may take.
        misses: questions in a row without a good answer after which it is started again.
        failures: lives in a row that did not last after which it is given up.
        sound_seconds: that a life has to last to count as sound.
        wait_seconds: before the second start in a row; each further one waits twice as long. The
            first is at once.
        end_seconds: to end by itself when it is told to.
    """

    load_seconds: float = 3600.0
    look_seconds: float = 0.2
    health_seconds: float = 2.0
    answer_seconds: float = 10.0
    misses: int = 3
    failures: int = 5
    sound_seconds: float = 60.0
    wait_seconds: float = 1.0
    end_seconds: float = 10.0


class Supervised:
    """An engine's process, and a thread that watches it. Methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        command: EngineCommand,
        address: Address,
        environ: Mapping[str, str],
        say: Callable[[str], None],
        given_up: Callable[[], None],
        patience: Patience | None = None,
        words: Callable[[], LastWords] = LastWords,
    ) -> None:
        """Nothing is started yet.

        Args:
            name: of the engine, for what is said.
            command: that starts it.
            address: where it will listen.
            environ: the process's environment.
            say: is told a line when it ends, and when it is back.
            given_up: is called, from the watching thread, when an engine that has taken requests
                is not started again.
            patience: how long it is waited for.
            words: makes what takes the engine's output of each of its lives.
        """
        self.name, self.address = name, address
        self.state, self.failure, self.restarts = "loading", "", 0
        self._command, self._environ = command, engine_environment(environ, command.environment)
        self._say, self._given_up = say, given_up
        self._patience = patience or Patience()
        self._new_words = words
        self._words = words()
        self._closing, self._changed = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._shared: frozenset[Path] = frozenset()
        self._began = 0.0
        # The kernel ties the engine's life to the thread that has started it, so one starts all.
        self._thread = threading.Thread(target=self._watch, name="mst-engine", daemon=True)

    @property
    def pid(self) -> int | None:
        """The number of the engine's first process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the engine and wait until it takes requests.

        Raises:
            EngineEnded: it doesn't; says why, in its own words.
        """
        self._thread.start()
        self._changed.wait()
        if self.state != "ready":
            raise EngineEnded(self.failure or f"{self.name} was stopped while it was loading.")

    def asked(self) -> None:
        """Note that a request is about to be sent: what the engine writes is not kept any more."""
        self._words.asked()

    def well(self) -> bool:
        """Ask the engine whether it takes requests."""
        return self.state == "ready" and answers(self.address, self._command.health, 2.0)

    def close(self) -> None:
        """End the engine and its children, and wait for it."""
        self._closing.set()
        if self._process is not None:
            with suppress(OSError):
                self._process.terminate()
        if self._thread.is_alive():
            self._thread.join(self._patience.end_seconds + 3 * SESSION_SECONDS)

    def _watch(self) -> None:
        failures, first = 0, True
        while not self._closing.is_set():
            self._words = words = self._new_words()
            self._began = time.time()
            ended = self._begin(words)
            ready = self._wait_ready(ended)
            if ready:
                self._shared = shared_memory(session(self.pid or 0), self._began)
                if not first:
                    self._say(f"{self.name} answers again after {time.time() - self._began:.1f} s")
                self.state = "ready"
                self._changed.set()
                became = time.monotonic()
                self._wait_end(ended)
            # At once, before anything is cleared away: nothing more is to be sent here.
            self.state = "stopping" if self._closing.is_set() else "restarting"
            how = self._clear(ended)
            if self._closing.is_set():
                break
            sound = ready and time.monotonic() - became > self._patience.sound_seconds
            failures = 1 if sound else failures + 1
            # What can't be loaded once can't be loaded again; what was ready has been loaded.
            if (first and not ready) or failures >= self._patience.failures:
                self._give_up(how, words, loaded=not first or ready)
                break
            first = False
            self.restarts += 1
            self._say(f"{self.name} {how}; it is started again")
            self._closing.wait(
                0 if failures == 1 else self._patience.wait_seconds * 2 ** (failures - 2)
            )
        self._changed.set()

    def _give_up(self, how: str, words: LastWords, loaded: bool) -> None:
        self.failure = f"{self.name} {how} while it was loading the model."
        if loaded:
            times = self._patience.failures
            self.failure = f"{self.name} {how}, {times} times in a row, and is given up."
        self.failure += words.told()
        self.state = "failed"
        self._changed.set()
        if loaded:
            self._given_up()

    def _begin(self, words: LastWords) -> threading.Event:
        """Start a process, and return what is set once it has ended."""
        if self.address.socket is not None:
            with suppress(FileNotFoundError):  # of the life before
                os.unlink(self.address.socket)
        process = subprocess.Popen(
            [sys.executable, "-m", "mst.serve.engines.launch", *self._command.arguments],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal is the server's: answers under way are finished first.
            start_new_session=True,
        )
        self._process = process
        ended = threading.Event()
        assert process.stdout is not None
        threading.Thread(target=_read, args=(process.stdout, words), daemon=True).start()
        threading.Thread(target=_wait, args=(process.pid, ended), daemon=True).start()
        return ended

    def _wait_ready(self, ended: threading.Event) -> bool:
        until = time.monotonic() + self._patience.load_seconds
        while time.monotonic() < until and not self._closing.is_set():
            if ended.wait(self._patience.look_seconds):
                return False
            if answers(self.address, self._command.health, self._patience.answer_seconds):
                return True
        return False

    def _wait_end(self, ended: threading.Event) -> None:
        misses = 0
        while misses < self._patience.misses and not self._closing.is_set():
            if ended.wait(self._patience.health_seconds):
                return
            well = answers(self.address, self._command.health, self._patience.answer_seconds)
            misses = 0 if well else misses + 1
            # Told as soon as it is known; an engine that is well again may go on.
            self.state = "ready" if well else "restarting"

    def _clear(self, ended: threading.Event) -> str:
        """End what is left of the process and its children; return how it has ended."""
        process = self._process
        assert process is not None
        asked = not ended.is_set()
        if asked:
            process.terminate()
            ended.wait(self._patience.end_seconds)
        # While the first process is not reaped, its number is no other's.
        end_session(process.pid, self._shared, self._began)
        code = process.wait()
        if asked:
            return "did not answer, and was ended"
        if code >= 0:
            return f"ended with code {code}"
        with suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
        return f"ended by signal {-code}"


def engine_environment(environ: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Return an engine's environment: the user's, without secrets and Python's own, kept offline.

    Args:
        environ: the process's.
        own: the engine's, which has the last word.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if not (_SECRET.search(name) or _PYTHON.match(name))
    }
    offline = {
        **offline_environment(),
        "HF_DATASETS_OFFLINE": "1",
        "OTEL_SDK_DISABLED": "true",
        # Neither the working directory nor the user's own packages take the place of the engine's.
        "PYTHONSAFEPATH": "1",
        "PYTHONNOUSERSITE": "1",
    }
    return {**kept, **offline, **own}


def _read(pipe: BinaryIO, words: LastWords) -> None:
    """Read what an engine writes, so that it never waits for it."""
    with pipe:
        # A line without end would be kept whole.
        while line := pipe.readline(1 << 16):
            words.add(line)


def _wait(pid: int, ended: threading.Event) -> None:
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    ended.set()
