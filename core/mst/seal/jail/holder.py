"""Workers that a Python program starts: one process enters the jail, and starts them all inside.

A program that called `mst.train` can't be sealed itself: it has threads, and its own business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from mst.errors import MstError
from mst.seal.jail import ladder, words
from mst.seal.jail.command import write
from mst.seal.jail.seal import OFF, JailRequest, Scene, Seal, current

_asked: ContextVar[tuple[JailRequest, Scene]] = ContextVar("_asked")


@contextlib.contextmanager
def asking(request: JailRequest, scene: Scene) -> Iterator[None]:
    """Seal what is started in this context as `request` asks."""
    token = _asked.set((request, scene))
    try:
        yield
    finally:
        _asked.reset(token)


def known() -> Seal | None:
    """Return this process's jail, or the decision that what it starts has none."""
    request, _ = _asked.get((JailRequest(), Scene()))
    return Seal(OFF, reason=request.reason) if request.mode == OFF else current()


def sealed(command: Sequence[str], seal_file: Path | None = None) -> list[str]:
    """Return a command that runs `command` in a jail; itself where this process is in one.

    Args:
        command: a program and its arguments.
        seal_file: where the jail is written down.
    """
    request, scene = _asked.get((JailRequest(), Scene()))
    if current() is not None or request.mode == OFF:
        return list(command)
    return _holder(request, scene, seal_file, {"command": list(command)})


def sealed_ranks(
    module: str, ranks: Sequence[Sequence[str]], keep_open: Sequence[int], seal_file: Path | None
) -> list[str] | None:
    """Return a command that runs a job's ranks in one jail; None where none is to be entered.

    Arguments are as of `mst.launch.run_ranks`.
    """
    request, scene = _asked.get((JailRequest(), Scene()))
    if current() is not None or request.mode == OFF:
        return None
    job: dict[str, object] = {
        "module": module,
        "ranks": [list(each) for each in ranks],
        "keep_open": list(keep_open),
    }
    return _holder(request, scene, seal_file, job)


def reporting(request: JailRequest, scene: Scene) -> list[str]:
    """Return arguments of Python that enter a jail, print it as JSON, and end."""
    return _holder(request, scene, None, {"report": True})[1:]


def _holder(
    request: JailRequest, scene: Scene, seal_file: Path | None, job: dict[str, object]
) -> list[str]:
    facts = {
        "request": dataclasses.asdict(request),
        "scene": dataclasses.asdict(scene),
        "seal_file": None if seal_file is None else str(seal_file),
        **job,
    }
    return [sys.executable, "-m", "mst.seal.jail.holder", json.dumps(facts)]


def main(argv: Sequence[str]) -> int:
    """Enter the jail and run what the argument says; return its exit code."""
    facts = json.loads(argv[1])
    asked, scene = facts["request"], facts["scene"]
    meeting = scene["meeting"]
    try:
        seal = ladder.enter(
            JailRequest(asked["mode"], asked["reason"], tuple(asked["allow_net"])),
            Scene(
                scene["shared"],
                None if meeting is None else (meeting[0], meeting[1]),
                scene["nnodes"],
                tuple(scene["outputs"]),
                tuple(scene["listeners"]),
                scene["reads_only"],
            ),
            os.environ,
        )
        if facts["seal_file"]:
            write(seal, Path(facts["seal_file"]))
        if facts.get("report"):
            print(json.dumps(seal.to_json()))
            return 0
        os.environ[words.VARIABLE] = words.told(seal)
        if "command" in facts:
            os.execvp(facts["command"][0], facts["command"])
        from mst.launch import run_ranks

        return run_ranks(facts["module"], facts["ranks"], os.environ, facts["keep_open"])
    except MstError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
