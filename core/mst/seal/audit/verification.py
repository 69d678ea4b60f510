"""Whether a log is what was written: every line, every signature, and nothing cut off."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.errors import AuditError
from mst.seal.audit import head, key, place
from mst.seal.audit.chain import ACKNOWLEDGED, BEGUN, CHECKPOINT, PRUNED, SEGMENT, Broken, Chain
from mst.seal.audit.event import digest, line_of

EXPORT_TYPE = "mst audit checkpoint"
_LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class FileReport:
    """One file of a log.

    Attributes:
        name: of the file.
        size: bytes.
        sha256: of all of them.
        log: name of the chain that it belongs to; "" when its first line is damaged.
        events: lines that are whole and in their place.
        first_time: of the first event; "" for none.
        last_time: of the last one.
        problem: the first thing that is wrong; "" for nothing.
    """

    name: str
    size: int
    sha256: str
    log: str
    events: int
    first_time: str
    last_time: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """What `mst audit verify` found.

    Attributes:
        directory: of the log.
        files: one report a file.
        events: lines that are whole and in their place.
        unsigned: events after the last checkpoint.
        unended: commands that have begun and not ended: they run, or were killed.
        public_key: of the newest chain, in hexadecimal.
        problems: what is wrong; () for nothing.
        acknowledged: damage that somebody has acknowledged, in the bytes that it has still.
    """

    directory: str
    files: tuple[FileReport, ...]
    events: int
    unsigned: int
    unended: int
    public_key: str
    problems: tuple[str, ...]
    acknowledged: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems


# Takes a line without its end, and its event.
Take = Callable[[bytes, dict[str, Any]], object]


@dataclass
class _Seen:
    """What is gathered on the way through the files."""

    files: list[FileReport] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    acknowledged: dict[str, str] = field(default_factory=dict)
    unended: set[str] = field(default_factory=set)
    acknowledged_in: int = 0
    pruned_to: int = 0
    last: Chain = field(default_factory=Chain)
    wanted: Mapping[str, Any] | None = None
    found_wanted: bool = False
    take: Take = lambda line, event: None


def verify(
    directory: Path,
    public_key: str | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    take: Take = lambda line, event: None,
) -> Verification:
    """Check a whole log, and its end by the newest checkpoint beside it.

    Args:
        directory: of the log, or a copy of it.
        public_key: that must have signed it, in hexadecimal; default that of key.pub beside it.
        checkpoint: exported earlier: all that it covers must be there.
        take: told of each line that is whole and in its place, oldest first.

    Raises:
        AuditError: there is no log.
    """
    with _unwritten(directory):
        return _verify(directory, public_key, _Seen(wanted=checkpoint, take=take), with_head=True)


@contextmanager
def _unwritten(directory: Path) -> Iterator[None]:
    """Let nobody write meanwhile: the lines and the checkpoint beside them are of one moment."""
    names = place.segments(directory)
    if not names:
        yield
        return
    with (directory / names[-1]).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def verify_files(directory: Path) -> Verification:
    """Check a log as `verify` does, but for the checkpoint beside it; its caller has the lock."""
    return _verify(directory, None, _Seen(), with_head=False)


def read_export(path: Path) -> tuple[dict[str, Any], str]:
    """Return the checkpoint and the public key in a file that `mst audit export` wrote.

    Raises:
        AuditError: it is none, or its signature is not that key's.
    """
    try:
        value = json.loads(path.read_bytes())
        checkpoint, public = value["checkpoint"], value["public_key"]
        if value["type"] != EXPORT_TYPE:
            raise ValueError
        chain = Chain()
        chain.continue_from(checkpoint)
        if chain.public_key != public:
            raise ValueError
    except OSError as error:
        raise AuditError(f"cannot read the checkpoint {path}: {error.strerror}.") from None
    except (Broken, ValueError, KeyError, TypeError):
        raise AuditError(
            f"{path} holds no checkpoint that its key has signed. Pass a file that `mst audit"
            " export` wrote, unchanged."
        ) from None
    return checkpoint, str(public)


def _verify(directory: Path, public_key: str | None, seen: _Seen, with_head: bool) -> Verification:
    names = place.segments(directory)
    if not names:
        raise AuditError(
            f"{directory} holds no audit log. `mst train` and others begin one; --audit-log DIR"
            " names another directory."
        )
    for name in names:
        _read_file(directory / name, seen)
    problems, acknowledged = _judged(seen, names)
    if seen.last.public_key and not any(each.problem for each in seen.files[-1:]):
        trusted = public_key or key.read_public(directory / key.PUBLIC)
        if trusted != seen.last.public_key:
            problems.append("the log is signed by another key than the one that was to sign it")
    if with_head:
        problems += _against_head(directory, seen)
    if seen.wanted is not None and not seen.found_wanted:
        problems.append(
            f"the exported checkpoint, over {seen.wanted['seq']} events, is not in the log: its end"
            " was cut off, it was written anew, or what the checkpoint covers was pruned"
        )
    return Verification(
        directory=str(directory),
        files=tuple(seen.files),
        events=sum(each.events for each in seen.files),
        unsigned=seen.last.seq - seen.last.signed,
        unended=len(seen.unended),
        public_key=seen.last.public_key,
        problems=tuple(problems),
        acknowledged=tuple(acknowledged),
    )


def _read_file(path: Path, seen: _Seen) -> None:
    """Go through one file up to the first line that is not in its place; hash all of it."""
    chain, hasher = Chain(), hashlib.sha256()
    problem, first_time, size, events = "", "", 0, 0
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            hasher.update(line)
            size += len(line)
            if problem:
                continue
            try:
                if not line.endswith(b"\n"):
                    raise Broken("the last line is torn")
                event = chain.take(line[:-1]) if events else chain.begin(line[:-1])
                if not events:
                    _check_link(event, seen, path.name)
                _notice(event, seen, path.name)
                seen.take(line[:-1], event)
                first_time = first_time or event["time"]
                events += 1
            except Broken as found:
                problem = f"{path.name}, line {events + 1}: {found}"
    if not events and not problem:
        problem = f"{path.name} is empty"
    if problem:
        seen.problems.append((path.name, problem))
    seen.files.append(
        FileReport(
            path.name, size, hasher.hexdigest(), chain.log, events, first_time, chain.time, problem
        )
    )
    seen.last = chain


def _check_link(event: Mapping[str, Any], seen: _Seen, name: str) -> None:
    """Raise Broken unless a file's first event follows the file before it."""
    kind, facts = event["event"], event["facts"]
    if kind == SEGMENT:
        if facts.get("segment") != place.segment_number(name):
            raise Broken("the file has another's number")
        whole = seen.files and not seen.files[-1].problem
        follows = seen.files and (
            place.segment_number(seen.files[-1].name) == place.segment_number(name) - 1
        )
        if whole and follows and seen.last.prev != event["prev"]:
            raise Broken("it does not follow the file before")
    elif kind == BEGUN and name != place.segment_name(1):
        raise Broken("a log begins in the middle")


def _notice(event: Mapping[str, Any], seen: _Seen, name: str) -> None:
    """Remember what an event says of the log itself."""
    facts = event["facts"]
    if event["event"] == "command.begun":
        seen.unended.add(event["command"])
    elif event["event"] == "command.ended":
        seen.unended.discard(event["command"])
    elif event["event"] == PRUNED:
        seen.pruned_to = max(seen.pruned_to, int(facts["through"]))
    elif event["event"] == ACKNOWLEDGED:
        seen.acknowledged_in = place.segment_number(name)
        for each in facts["files"]:
            seen.acknowledged[each["file"]] = each["sha256"]
    elif event["event"] == CHECKPOINT and event == seen.wanted:
        seen.found_wanted = True


def _judged(seen: _Seen, names: list[str]) -> tuple[list[str], list[str]]:
    """Return the problems that nobody has acknowledged, and those that somebody has."""
    digests = {each.name: each.sha256 for each in seen.files}
    known = {name for name, sha256 in seen.acknowledged.items() if digests.get(name) == sha256}
    problems = [text for name, text in seen.problems if name not in known]
    acknowledged = [text for name, text in seen.problems if name in known]
    for name in sorted(seen.acknowledged):
        if name not in known and place.segment_number(name) > seen.pruned_to:
            problems.append(f"{name} was changed or removed after it was acknowledged")
    numbers = [place.segment_number(each) for each in names]
    there = {*numbers, *range(1, seen.pruned_to + 1)}
    there |= {place.segment_number(each) for each in seen.acknowledged}
    for number in range(1, numbers[-1]):
        if number not in there:
            text = f"{place.segment_name(number)} is missing, and was not pruned"
            (acknowledged if number < seen.acknowledged_in else problems).append(text)
    return problems, acknowledged


def _against_head(directory: Path, seen: _Seen) -> list[str]:
    try:
        handle = os.open(directory / place.HEAD, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return [f"{place.HEAD} is missing, so the end can't be checked but by an export"]
    try:
        told = head.read(handle)
    finally:
        os.close(handle)
    if told is None:
        return [f"{place.HEAD} is damaged, so the end can't be checked but by an export"]
    newest = seen.last.checkpoint
    try:
        same = newest is not None and digest(line_of(newest)) == digest(line_of(told.checkpoint))
    except (ValueError, TypeError):
        same = False
    if not same and not any(each.problem for each in seen.files[-1:]):
        return [f"the newest checkpoint is not the one in {place.HEAD}: the end was cut off"]
    return []
