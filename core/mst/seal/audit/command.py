"""A command's part in the log: that it began, what it did, and how it ended."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import EXIT_FAILED, EXIT_INTERRUPTED, AuditError, MstError

if TYPE_CHECKING:
    from mst.seal.audit.event import JsonValue
    from mst.seal.audit.log import Log

# Commands that read data or a model's weights, or write what is made of them; the others look at
# the machine, at run directories or at configuration.
LOGGED = frozenset(
    {
        "apikeys", "bench", "bundle", "chat", "data", "eval", "export", "merge", "models", "plan",
        "preview", "serve", "sign", "train", "ui",
    }
)  # fmt: skip


class Command:
    """A command that is being logged.

    Attributes:
        code: its exit code, to be set before it ends.
    """

    def __init__(self, log: Log) -> None:
        """Write to this log."""
        self.code = 0
        self._log = log
        self._process = os.getpid()
        self._waiting: list[tuple[str, str, Mapping[str, JsonValue]]] = []
        self._said = False

    def record(self, event: str, facts: Mapping[str, JsonValue]) -> None:
        """Write an event; one that can't be written is kept and tried again with the next.

        A job of many hours is not ended for it: its result is written, and the command then fails.
        """
        from mst.seal.audit.event import now

        if os.getpid() != self._process:  # a fork of ours
            return
        self._waiting.append((event, now(), facts))
        try:
            self.write_waiting()
        except AuditError as error:
            if not self._said:
                print(f"{error} The job goes on; the event is tried again.", file=sys.stderr)
            self._said = True

    def write_waiting(self) -> None:
        """Write the events that could not be written before.

        Raises:
            AuditError: they still can't.
        """
        while self._waiting:
            event, when, facts = self._waiting[0]
            self._log.append(event, facts, when)
            del self._waiting[0]

    def finish(self) -> None:
        """Write what waits, sign all, and make it durable.

        Raises:
            AuditError: it can't be written.
        """
        self.write_waiting()
        self._log.checkpoint()


# The one log of this process. It is global because what is recorded is found out deep in the core,
# where passing a log through every signature would tie all of it to this package.
_open: Command | None = None


def record(event: str, **facts: JsonValue) -> None:
    """Append an event to the log that is open in this process; without one, do nothing.

    Args:
        event: what happened, as "subject.verb".
        facts: numbers, names, paths and hashes. Never a row, a prompt, a passphrase or a key.
    """
    if _open is not None:
        _open.record(event, facts)


@contextmanager
def open_log(directory: Path | None, command: str, **facts: JsonValue) -> Iterator[Command | None]:
    """Log a command: its beginning, what `record` is told meanwhile, and its end.

    Inside another command's log nothing is opened: that one takes the events.

    Args:
        directory: of the log; None for the one that the settings name.
        command: its name.
        facts: what it was given.

    Raises:
        AuditError: the log can't be written, or somebody has changed it; the command must not
            begin. Or the end of a command that succeeded can't be written.
    """
    global _open
    if _open is not None:
        yield None
        return
    from mst.seal.audit.event import who
    from mst.seal.audit.opening import open_directory
    from mst.seal.audit.place import directory_of

    by = who(os.urandom(6).hex())
    log = open_directory(directory_of(None) if directory is None else directory, by)
    try:
        log.append("command.begun", {"name": command, **_session(), **facts})
        log.checkpoint()
    except BaseException:
        log.close()
        raise
    running = _open = Command(log)
    began = time.monotonic()
    failed: BaseException | None = None
    try:
        yield running
    except BaseException as error:
        failed = error
        raise
    finally:
        _open = None
        try:
            _end(running, command, began, failed)
        finally:
            log.close()


def _end(running: Command, command: str, began: float, failed: BaseException | None) -> None:
    facts: dict[str, JsonValue] = {"name": command, "code": _code(running, failed)}
    if failed is not None and not isinstance(failed, SystemExit):
        facts["error"] = type(failed).__name__
    running.record("command.ended", {**facts, "seconds": round(time.monotonic() - began, 3)})
    try:
        running.finish()
    except AuditError as error:
        if failed is None and not running.code:
            raise AuditError(
                f"mst {command} is done, and what it wrote is whole; but {error}"
            ) from None


def _code(running: Command, failed: BaseException | None) -> int:
    if failed is None:
        return running.code
    if isinstance(failed, MstError):
        return failed.exit_code
    if isinstance(failed, SystemExit):
        return failed.code if isinstance(failed.code, int) else int(failed.code is not None)
    return EXIT_INTERRUPTED if isinstance(failed, KeyboardInterrupt) else EXIT_FAILED


def _session() -> dict[str, JsonValue]:
    """Return what ties a command to a login: the kernel's audit user outlives sudo and su."""
    import mst

    found: dict[str, JsonValue] = {"mst": mst.__version__}
    with suppress(OSError):  # it may have been removed under us
        found["directory"] = os.getcwd()
    with suppress(OSError, ValueError):
        with open("/proc/self/loginuid", encoding="ascii") as file:
            login = int(file.read())
        if login != 2**32 - 1:
            found["login_uid"] = login
    return found


def add_option(name: str, parser: argparse.ArgumentParser) -> None:
    """Add `--audit-log` to a command that is logged, before and behind the name of its action."""
    if name not in LOGGED and name != "audit":
        return
    words = "directory of the audit log (mst/audit in the user's state directory)"
    parser.add_argument("--audit-log", metavar="DIR", help=words)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                inner.add_argument(
                    "--audit-log", metavar="DIR", default=argparse.SUPPRESS, help=words
                )


def run_logged(
    name: str,
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], int],
) -> int:
    """Run a command and return its exit code; one that touches data or models is logged."""
    if name not in LOGGED:
        return run(args)
    from mst.seal.audit.arguments import given
    from mst.seal.audit.place import directory_of

    with open_log(directory_of(args.audit_log), name, **given(parser, args)) as running:
        code = run(args)
        if running is not None:
            running.code = code
    return code
