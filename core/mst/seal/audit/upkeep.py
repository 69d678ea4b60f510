"""Keeping a log: what is put elsewhere, what may be removed, and going on after damage."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from mst.durable import sha256, write_text
from mst.errors import AuditError
from mst.seal.audit import key, place
from mst.seal.audit.chain import ACKNOWLEDGED, PRUNED
from mst.seal.audit.event import Who
from mst.seal.audit.opening import begin_chain, open_directory, rotate
from mst.seal.audit.refusals import cannot_write
from mst.seal.audit.verification import EXPORT_TYPE, FileReport, Verification, verify

# China's Cybersecurity Law, article 21(3): network logs are kept for at least six months.
KEPT_MONTHS = 6


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory, so that no command has the log open."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise cannot_write(directory, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise AuditError(
            f"a command has the audit log in {directory} open. Wait until it has ended; other"
            " commands can keep another log meanwhile: --audit-log DIR."
        ) from None
    finally:
        os.close(handle)


def export(directory: Path, target: Path, by: Who) -> dict[str, Any]:
    """Write a checkpoint over all events so far, with the public key, to keep elsewhere.

    Raises:
        AuditError: the log was changed, or either can't be written.
    """
    log = open_directory(directory, by)
    try:
        log.append("log.exported", {"file": str(target)})
        checkpoint = dict(log.checkpoint())
    finally:
        log.close()
    public = str(checkpoint["facts"]["public_key"])
    value = {"type": EXPORT_TYPE, "checkpoint": checkpoint, "public_key": public}
    try:
        write_text(target, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise AuditError(f"cannot write {target}: {error.strerror}. Choose another file.") from None
    return value


@dataclass(frozen=True)
class Acknowledgement:
    """What was acknowledged: the problems, and the file in which the log goes on."""

    problems: tuple[str, ...]
    file: str


def acknowledge(directory: Path, reason: str, by: Who) -> Acknowledgement:
    """Begin a new chain after damage, which says who has seen it, and what was left.

    The damaged files stay; their hashes are in the new chain.

    Raises:
        AuditError: nothing is wrong, or the log can't be written.
    """
    place.prepare_directory(directory)
    with _alone(directory):
        names = place.segments(directory)
        found = verify_or_nothing(directory)
        problems = _problems(directory, found)
        if not problems:
            raise AuditError(
                f"nothing is wrong with the audit log in {directory}, so there is nothing to"
                " acknowledge."
            )
        try:
            has_key = (directory / key.KEY).exists()
            signing = key.load(directory) if has_key else key.create(directory)
            files = [{"file": name, "sha256": sha256(directory / name)} for name in names]
            last = max([place.segment_number(each) for each in names], default=0)
            facts = {
                "reason": reason,
                "problems": list(problems),
                "files": files,
                "new_key": not has_key,
            }
            begin_chain(directory, last + 1, ACKNOWLEDGED, facts, by, signing)
        except OSError as error:
            raise cannot_write(directory, error) from None
    return Acknowledgement(problems, place.segment_name(last + 1))


def verify_or_nothing(directory: Path) -> Verification | None:
    """Return what `verify` finds; None where no file of a log is left."""
    return verify(directory) if place.segments(directory) else None


def _problems(directory: Path, found: Verification | None) -> tuple[str, ...]:
    problems = () if found is None else found.problems
    if found is None and ((directory / key.KEY).exists() or (directory / place.HEAD).exists()):
        problems = ("all events are gone",)
    if found is not None and not (directory / key.KEY).exists():
        problems = (*problems, "the key is missing")
    elif found is not None and found.public_key != key.public_hex(key.load(directory)):
        problems = (*problems, "the key is another")
    return problems


def earliest_kept(today: date) -> date:
    """Return the day from which on events must be kept: six months before today."""
    months = today.year * 12 + today.month - 1 - KEPT_MONTHS
    year, month = divmod(months, 12)
    for day in range(today.day, 0, -1):
        try:
            return date(year, month + 1, day)
        except ValueError:  # a shorter month
            continue
    raise AssertionError


def prune(directory: Path, before: date, by: Who) -> tuple[FileReport, ...]:
    """Remove the files of a log whose events are all older than a day, and return what they were.

    What stays verifies: the next file names the last line of the one before it, with its signed
    checkpoint, and an event has the hashes of what was removed.

    Raises:
        AuditError: the day is less than six months ago, or the log was changed.
    """
    latest = earliest_kept(datetime.now(timezone.utc).date())
    if before > latest:
        raise AuditError(
            f"--before {before} is less than {KEPT_MONTHS} months ago: logs are kept for at least"
            " that long (Cybersecurity Law of China, article 21(3)). The latest day is"
            f" {latest}."
        )
    found = verify(directory)
    if found.problems:
        raise AuditError(f"the audit log in {directory} is not whole: {found.problems[0]}.")
    old: list[FileReport] = []
    for each in found.files[:-1]:
        if each.last_time[:10] >= before.isoformat():
            break
        old.append(each)
    if not old:
        return ()
    with _alone(directory):
        rotate(directory, by)
    log = open_directory(directory, by)
    try:
        facts = {
            "before": before.isoformat(),
            "through": place.segment_number(old[-1].name),
            "files": [
                {
                    "file": each.name, "sha256": each.sha256, "events": each.events,
                    "first_time": each.first_time, "last_time": each.last_time,
                }
                for each in old
            ],
        }  # fmt: skip
        log.append(PRUNED, facts)
        for each in old:
            (directory / each.name).unlink()
        log.forget(tuple(each.name for each in old))
        log.checkpoint()
    except OSError as error:
        raise cannot_write(directory, error) from None
    finally:
        log.close()
    return tuple(old)
