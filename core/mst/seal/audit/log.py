"""The log of one directory, open for appending: one chain for all processes that write to it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mst.errors import AuditError
from mst.seal.audit import head, place
from mst.seal.audit.chain import Broken, Chain
from mst.seal.audit.event import Who, line_of, make, now
from mst.seal.audit.key import load, public_hex
from mst.seal.audit.refusals import MEND, cannot_write, changed, gone

CHECKPOINT_EVERY = 64
# A clock that is set by NTP may step back a little.
_CLOCK_SLACK = timedelta(seconds=1)


class Log:
    """A log that this process appends to; `mst.seal.audit.opening` opens it.

    All files are opened at once, and only they are written to afterwards: a jail that takes a
    process's rights away doesn't stop its log. Each append holds the newest file's lock.

    Attributes:
        directory: of the log.
        by: who writes.
        newest: name of the file that is written to.
        key: that signs.
        chain: how far the log has come.
    """

    def __init__(self, directory: Path, by: Who, folder: int | None = None) -> None:
        """Open the files, check the log's end, and repair a torn last line.

        Args:
            directory: of a log that has begun.
            by: who writes.
            folder: the directory, open with its lock; closed with the log.

        Raises:
            AuditError: it can't be written, or somebody has changed it.
        """
        self.directory, self.by = directory, by
        self._threads = threading.Lock()
        self._handles: list[int] = []
        try:
            self._enter()
        except OSError as error:
            self.close()
            raise cannot_write(directory, error) from None
        except BaseException:
            self.close()
            raise
        if folder is not None:
            self._handles.append(folder)

    def _open(self, path: Path, flags: int) -> int:
        handle = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._handles.append(handle)
        return handle

    def _enter(self) -> None:
        names = place.segments(self.directory)
        self.key = load(self.directory)
        if not names:
            raise gone(self.directory)
        self.newest = names[-1]
        self._file = self._open(self.directory / self.newest, os.O_RDWR | os.O_APPEND)
        self._head = self._open_head()
        self._closed = head.stamps(self.directory, names[:-1])
        with self._locked():
            told = head.read(self._head)
            self.chain, self._size = _at_end(
                self.directory, self._closed, self.newest, self._file, told
            )
            if self.chain.public_key != public_hex(self.key):
                raise AuditError(
                    f"the key of the audit log in {self.directory} is not the one that its"
                    f" checkpoints are signed with.{MEND}"
                )
            self._catch_up()
            if told is None:
                self._write_event("log.repaired", {"file": place.HEAD})
                self._checkpoint()

    def _open_head(self) -> int:
        path = self.directory / place.HEAD
        try:
            return self._open(path, os.O_RDWR)
        except FileNotFoundError:
            return self._open(path, os.O_RDWR | os.O_CREAT)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the newest file: threads of this process by a lock, others by the kernel's."""
        with self._threads:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def append(self, event: str, facts: Mapping[str, Any], time: str | None = None) -> None:
        """Write one event; every so many, a checkpoint too.

        Args:
            event: what happened.
            facts: what there is to say of it.
            time: when it did; default now.

        Raises:
            AuditError: it can't be written, or somebody has changed the log.
        """
        try:
            with self._locked():
                self._catch_up()
                self._mind_the_clock()
                self._write_event(event, facts, time)
                if self.chain.seq - self.chain.signed >= CHECKPOINT_EVERY:
                    # The event is written, and must not be written again: the next one tries.
                    with suppress(OSError):
                        self._checkpoint()
        except OSError as error:
            raise cannot_write(self.directory, error) from None

    def checkpoint(self) -> Mapping[str, Any]:
        """Sign all events so far, make them durable, and return the checkpoint.

        Raises:
            AuditError: it can't be written, or somebody has changed the log.
        """
        try:
            with self._locked():
                self._catch_up()
                return self._checkpoint()
        except OSError as error:
            raise cannot_write(self.directory, error) from None

    def forget(self, names: Sequence[str]) -> None:
        """Leave out files that were pruned."""
        self._closed = {name: each for name, each in self._closed.items() if name not in names}

    def close(self) -> None:
        """Let go of the log; what was written stays."""
        for handle in self._handles:
            os.close(handle)
        self._handles = []

    def _write_event(
        self, event: str, facts: Mapping[str, Any], time: str | None = None
    ) -> dict[str, Any]:
        made = make(event, facts, self.chain.seq, self.chain.prev, self.by, time or now())
        self._write(made)
        return made

    def _write(self, event: Mapping[str, Any]) -> None:
        """Append an event's line; a half of one is taken back."""
        before = _copy(self.chain)
        line = self.chain.add(event) + b"\n"
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(28, "No space left on device")
        except OSError:
            self.chain = before
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def _checkpoint(self) -> Mapping[str, Any]:
        made = self.chain.sign(self.key, self.by, now())
        self._write(made)
        os.fdatasync(self._file)
        stamps = self._closed | {self.newest: head.stamp(os.fstat(self._file))}
        head.write(self._head, head.Head(made, stamps))
        return made

    def _catch_up(self) -> None:
        """Go on over what other processes have appended; drop a line that one left half."""
        size = os.fstat(self._file).st_size
        if size < self._size:
            raise self._changed("its end is gone")
        if size == self._size:
            return
        data = os.pread(self._file, size - self._size, self._size)
        whole = data.rfind(b"\n") + 1
        try:
            for line in data[:whole].splitlines():
                self.chain.take(line)
        except Broken as problem:
            raise self._changed(str(problem)) from None
        self._size += whole
        if torn := data[whole:]:
            os.ftruncate(self._file, self._size)
            digest = hashlib.sha256(torn).hexdigest()
            self._write_event("log.repaired", {"dropped_bytes": len(torn), "sha256": digest})

    def _mind_the_clock(self) -> None:
        back = _moment(self.chain.time) - _moment(now())
        if back > _CLOCK_SLACK:
            facts = {"seconds": round(back.total_seconds(), 3), "before": self.chain.time}
            self._write_event("log.clock_went_back", facts)

    def _changed(self, problem: str) -> AuditError:
        return changed(self.directory, f"{self.newest}, event {self.chain.seq}: {problem}")


def _copy(chain: Chain) -> Chain:
    copied = Chain(**vars(chain))
    copied.frontier = list(chain.frontier)
    return copied


def _moment(time: str) -> datetime:
    return datetime.strptime(time, "%Y-%m-%dT%H:%M:%S.%fZ")


def _at_end(
    directory: Path,
    closed: Mapping[str, head.Stamp],
    newest: str,
    file: int,
    told: head.Head | None,
) -> tuple[Chain, int]:
    """Return a log's chain, and how many bytes of its newest file it has come over.

    When no file was touched since the last checkpoint, that one's line is all that is read. When
    only the newest was, by a process that was killed or one that runs, that file is read; else all.

    Raises:
        AuditError: somebody has changed it.
    """
    known = {} if told is None else {n: each for n, each in told.files.items() if n < newest}
    if told is None or known != closed:
        from mst.seal.audit.verification import verify_files

        problems = verify_files(directory).problems
        if problems:
            raise changed(directory, problems[0])
    found = os.fstat(file)
    if told is not None and told.files.get(newest) == head.stamp(found):
        return _from_head(directory, told, file), found.st_size
    chain, size, seen = Chain(), 0, told is None
    with os.fdopen(os.dup(file), "rb") as reading:
        reading.seek(0)
        for line in reading:
            if not line.endswith(b"\n"):
                break
            try:
                event = chain.begin(line[:-1]) if size == 0 else chain.take(line[:-1])
            except Broken as problem:
                raise changed(directory, f"{newest}, byte {size}: {problem}") from None
            if told is not None and told.checkpoint in (event, event["facts"].get("after")):
                seen = True
            size += len(line)
    if not seen:
        raise changed(directory, f"the end of {newest} is gone")
    return chain, size


def _from_head(directory: Path, told: head.Head, file: int) -> Chain:
    chain = Chain()
    try:
        line = line_of(told.checkpoint) + b"\n"
        size = os.fstat(file).st_size
        if os.pread(file, len(line), max(0, size - len(line))) != line:
            raise Broken("its last line is not the last checkpoint")
        chain.continue_from(told.checkpoint)
    except (Broken, ValueError) as problem:
        raise changed(directory, str(problem)) from None
    return chain
