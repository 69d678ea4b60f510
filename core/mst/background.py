"""Commands that go on when the terminal or page that started them is gone.

Each is kept by a small process of its own (`mst.background_keeper`), which notes how it ended. What
is known of it lies in a directory that the user alone can read. A command line holds no secret:
keys, passphrases and PINs come from files, and commands that take or print texts are refused.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mst.durable import write_text
from mst.errors import EXIT_INTERRUPTED, MstError, UsageError
from mst.last_lines import last_lines
from mst.request import TASKS

WORK = "work.json"
PROCESS = "process.json"
ENDED = "ended.json"
OUTPUT = "output"
# None of these asks at a terminal, takes a text or prints a row.
KEPT = frozenset(
    {"bench", "bundle", "eval", "export", "merge", "model", "models", "plan", "serve", "train"}
).union(TASKS)
_MOST_ENDED = 200
# Between the directory of a work and the first line in it.
_BEGINNING_SECONDS = 10.0
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class BackgroundError(MstError):
    """A command can't be started, found or stopped in the background."""


@dataclass(frozen=True)
class Work:
    """A command in the background.

    Attributes:
        name: of its directory: when it was started, which command it is, and chance.
        arguments: what follows `mst` on its command line.
        directory: what is known of it lies here.
        started: UTC, ISO 8601.
        state: "running", "done" (exit code 0), "failed" (another), or "gone": it runs no longer,
            and nobody noted how it ended, as after a power cut.
        exit_code: of the command, 128 + N after signal N; None while it runs, and when it is gone.
        pid: of the command, which leads its process group; None where it did not come to run.
        cwd: the working directory, from which relative paths in `arguments` are read.
    """

    name: str
    arguments: tuple[str, ...]
    directory: Path
    started: str
    state: str
    exit_code: int | None
    pid: int | None
    cwd: Path


def default_place() -> Path:
    """Return where works are kept."""
    import platformdirs

    return platformdirs.user_state_path("mst") / "work"


def start(arguments: Sequence[str], *, place: Path | None = None, cwd: Path | None = None) -> Work:
    """Start `mst …` so that it outlives this process, and return once it runs.

    It has a session of its own, nothing on standard input, and its output in a file. The
    environment is this process's.

    Args:
        arguments: what follows `mst`; never a secret.
        place: where works are kept; None for the user's state directory.
        cwd: its working directory; None for this process's.

    Raises:
        UsageError: the command is none that can go on by itself.
        BackgroundError: it can't be started.
    """
    if not arguments or arguments[0] not in KEPT:
        named = arguments[0] if arguments else "nothing"
        raise UsageError(
            f"mst {named} can't go on in the background; these can: {', '.join(sorted(KEPT))}."
            " Type it in a terminal."
        )
    root = default_place() if place is None else place
    _prepare(root)
    _forget_oldest(root)
    directory = _new_directory(root, arguments[0])
    try:
        where = Path.cwd() if cwd is None else cwd.absolute()
        facts = {
            "arguments": list(arguments),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cwd": str(where),
        }
        # In ASCII: a path need not be UTF-8.
        write_text(directory / WORK, json.dumps(facts) + "\n", 0o600)
        handle = os.open(directory / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise BackgroundError(f"cannot begin {directory}: {error.strerror}.") from None
    try:
        code = _run_keeper(directory, where, handle)
    finally:
        os.close(handle)
    work = read(directory)
    if code != 0 or work is None:
        raise BackgroundError(
            f"`mst {arguments[0]}` could not be started in the background; {directory / OUTPUT}"
            " says why. Type it in a terminal."
        )
    return work


def _run_keeper(directory: Path, cwd: Path, output: int) -> int:
    """Run the keeper until it has left this process and the command runs; return its exit code."""
    try:
        return subprocess.run(
            [sys.executable, "-m", "mst.background_keeper", str(directory.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            check=False,
        ).returncode
    except OSError as error:
        raise BackgroundError(
            f"cannot start a process in {cwd}: {error.strerror}. Does that directory exist?"
        ) from None


def _prepare(root: Path) -> None:
    """Make the directory of works, and see that it is the user's alone."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.stat()
    except OSError as error:
        raise BackgroundError(
            f"cannot make {root}, where commands in the background are kept: {error.strerror}."
            " XDG_STATE_HOME names another place."
        ) from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise BackgroundError(
            f"{root} is not yours alone (owner {found.st_uid}, mode"
            f" {stat.S_IMODE(found.st_mode):04o}). Type: chmod 700 {root}"
        )


def _new_directory(root: Path, command: str) -> Path:
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    path = root / f"{stamp}-{command}-{secrets.token_hex(4)}"
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise BackgroundError(f"cannot make {path}: {error.strerror}.") from None
    return path


def works(place: Path | None = None) -> tuple[Work, ...]:
    """Return what was started in the background, oldest first; what is damaged is left out."""
    root = default_place() if place is None else place
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return ()
    found = (read(root / each) for each in names)
    return tuple(each for each in found if each is not None)


def find(name: str, place: Path | None = None) -> Work:
    """Return the work of this name.

    Raises:
        BackgroundError: there is none.
    """
    root = default_place() if place is None else place
    # A name from a page's address must not lead elsewhere.
    work = read(root / name) if name and name == os.path.basename(name) else None
    if work is None:
        raise BackgroundError(f"nothing of that name was started in the background: {name[:100]!r}")
    return work


def read(directory: Path) -> Work | None:
    """Return what a directory tells of a work; None where it tells of none."""
    known = _read(directory / WORK)
    arguments, cwd = known.get("arguments"), known.get("cwd")
    if not isinstance(arguments, list) or not arguments or not isinstance(cwd, str):
        return None
    process = _read(directory / PROCESS)
    # Looked for before the end is: a command that ends meanwhile has written it by then.
    alive = any(
        _lives(process.get(pid), process.get(f"{pid}_identity")) for pid in ("keeper", "command")
    )
    code = _read(directory / ENDED).get("exit_code")
    if isinstance(code, int):
        state = "failed" if code else "done"
    else:
        code, state = None, "running" if alive or _beginning(directory, process) else "gone"
    pid = process.get("command")
    return Work(
        name=directory.name,
        arguments=tuple(map(str, arguments)),
        directory=directory,
        started=str(known.get("started", "")),
        state=state,
        exit_code=code,
        pid=pid if isinstance(pid, int) else None,
        cwd=Path(cwd),
    )


def run_of(work: Work) -> Path | None:
    """Return the run directory that a training work writes; None for other works."""
    if not work.arguments or work.arguments[0] not in ("train", *TASKS):
        return None
    for flag, value in zip(work.arguments, (*work.arguments[1:], ""), strict=True):
        name, equals, rest = flag.partition("=")
        if name in ("--output-dir", "--output_dir"):
            return work.cwd / (rest if equals else value)
    return None


def was_stopped(work: Work) -> bool:
    """Return whether a work has ended because it was asked to."""
    return work.exit_code == EXIT_INTERRUPTED


def _beginning(directory: Path, process: Mapping[str, Any]) -> bool:
    """Return whether another process is just starting the work."""
    with suppress(OSError):
        return not process and time.time() - directory.stat().st_mtime < _BEGINNING_SECONDS
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def identity(pid: int) -> str | None:
    """Return what tells a process from others that have had or will have its number.

    This boot and the tick at which the process began (proc_pid_stat(5), field 22); None where there
    is no such process, or it has ended and waits for its parent.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else f"{boot}:{fields[19]}"


def _lives(pid: object, known: object) -> bool:
    return isinstance(pid, int) and isinstance(known, str) and identity(pid) == known


def stop(work: Work, *, kill: bool = False) -> bool:
    """Ask a work to end, and return whether it still ran.

    Its process group gets SIGINT, as from Ctrl-C: `mst train` saves and can be resumed, `mst serve`
    finishes its answers. A second one makes them end at once.

    Args:
        work: as `works` has returned it.
        kill: end it with SIGKILL, for what does not answer; nothing is saved.

    Raises:
        BackgroundError: the system forbids it.
    """
    process = _read(work.directory / PROCESS)
    pid = process.get("command")
    if not isinstance(pid, int) or not _lives(pid, process.get("command_identity")):
        return False
    try:
        os.killpg(pid, signal.SIGKILL if kill else signal.SIGINT)
    except ProcessLookupError:
        return False
    except OSError as error:
        raise BackgroundError(f"cannot stop process {pid}: {error.strerror}.") from None
    return True


def beginning(work: Work, first_bytes: int = 1 << 16) -> str:
    """Return the first that a work has printed, as `output` returns the last."""
    with suppress(OSError), (work.directory / OUTPUT).open("rb") as file:
        return _printed(file.read(first_bytes))
    return ""


def output(work: Work, last_bytes: int = 1 << 16) -> str:
    """Return the end of what a work has printed, from the beginning of a line; "" for nothing.

    Control characters are left out, so that it can be shown in any terminal or page.
    """
    try:
        return _printed(last_lines(work.directory / OUTPUT, last_bytes))
    except OSError:
        return ""


def _printed(data: bytes) -> str:
    """Return what was printed as text that any terminal can show."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    # Of a line that was written over, the last state is kept.
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return _CONTROL.sub("", "\n".join(lines))


def forget(work: Work) -> None:
    """Remove what is known of a work that has ended; what it made stays.

    Raises:
        BackgroundError: it runs, or can't be removed.
    """
    import shutil

    newest = read(work.directory)
    if newest is not None and newest.state == "running":
        raise BackgroundError(f"{work.name} still runs. Stop it first.")
    try:
        shutil.rmtree(work.directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise BackgroundError(f"cannot remove {work.directory}: {error.strerror}.") from None


def _forget_oldest(root: Path) -> None:
    """Keep what is known of the newest works alone."""
    ended = [each for each in works(root) if each.state != "running"]
    for each in ended[: max(0, len(ended) - _MOST_ENDED)]:
        with suppress(BackgroundError):
            forget(each)
