"""Opening a log: it is begun where there is none, and a full file is followed by a new one."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.durable import sync_directory
from mst.seal.audit import head, key, place
from mst.seal.audit.chain import BEGUN, SEGMENT, Chain
from mst.seal.audit.event import Who, make, now
from mst.seal.audit.log import Log
from mst.seal.audit.refusals import cannot_write, gone

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# A file that a killed process left without a checkpoint is read whole at the next start: 16 MB are
# about 40,000 events, and take less than a second.
SEGMENT_BYTES = 16_000_000


def open_directory(directory: Path, by: Who, segment_bytes: int = SEGMENT_BYTES) -> Log:
    """Return a directory's log, open for appending; a shared lock is held on it meanwhile.

    Under that lock the newest file stays the newest: files are begun and removed by who holds the
    directory alone.

    Args:
        directory: of the log; made, with a key, where it isn't there.
        by: who writes.
        segment_bytes: beyond which a new file is begun.

    Raises:
        AuditError: it can't be written, or somebody has changed it.
    """
    place.prepare_directory(directory)
    folder = None
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(BlockingIOError):  # another command has the log open: it stays as it is
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _maintain(directory, by, segment_bytes)
        fcntl.flock(folder, fcntl.LOCK_SH)
        return Log(directory, by, folder)
    except BaseException as error:
        if folder is not None:
            with suppress(OSError):  # closed with the log
                os.close(folder)
        if isinstance(error, OSError):
            raise cannot_write(directory, error) from None
        raise


def _maintain(directory: Path, by: Who, segment_bytes: int) -> None:
    """Begin a log that isn't there, and a new file when the newest is full or of another month.

    The directory is locked, so no other process has the log open.
    """
    names = place.segments(directory)
    if not names:
        if any((directory / each).exists() for each in (key.KEY, place.HEAD)):
            raise gone(directory)
        begin_chain(directory, 1, BEGUN, {}, by, key.create(directory))
        return
    newest = directory / names[-1]
    with newest.open("rb") as file:
        first = file.readline(1 << 20)
    month = f'"time":"{now()[:7]}'.encode()
    if newest.stat().st_size < segment_bytes and month in first:
        return
    rotate(directory, by)


def rotate(directory: Path, by: Who) -> None:
    """Close the newest file with a checkpoint, and begin the next; the directory is locked.

    Raises:
        AuditError: the log was changed, or can't be written.
    """
    log = Log(directory, by)
    try:
        number = place.segment_number(log.newest) + 1
        # No second one: it would have today's time, and keep an old file from being pruned.
        signed = log.chain.checkpoint if log.chain.signed == log.chain.seq else log.checkpoint()
        facts = {"after": signed, "segment": number}
        _begin_file(directory, number, SEGMENT, facts, by, log.key, log.chain)
    finally:
        log.close()


def begin_chain(
    directory: Path,
    number: int,
    event: str,
    facts: Mapping[str, Any],
    by: Who,
    signing: Ed25519PrivateKey,
) -> None:
    """Begin a chain in a new file; the directory is locked.

    Args:
        directory: of the log.
        number: of the file.
        event: `BEGUN` or `ACKNOWLEDGED`.
        facts: beside the chain's name and its public key.
        by: who does it.
        signing: the log's key.
    """
    import mst

    chain = Chain(secrets.token_hex(16), key.public_hex(signing))
    own = {"log": chain.log, "public_key": chain.public_key, "mst": mst.__version__}
    _begin_file(directory, number, event, {**facts, **own}, by, signing, chain)


def _begin_file(
    directory: Path,
    number: int,
    event: str,
    facts: Mapping[str, Any],
    by: Who,
    signing: Ed25519PrivateKey,
    chain: Chain,
) -> None:
    """Write a file's first event and a checkpoint; it gets its name when both are on the disk."""
    part = directory / ".segment.part"
    first = chain.add(make(event, facts, chain.seq, chain.prev, by, now()))
    last = chain.sign(signing, by, now())
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(first + b"\n" + chain.add(last) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(directory / place.segment_name(number))
    handle = os.open(directory / place.HEAD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        head.write(handle, head.Head(last, head.stamps(directory, place.segments(directory))))
    finally:
        os.close(handle)
    sync_directory(directory)
