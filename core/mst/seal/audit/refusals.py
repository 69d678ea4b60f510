"""Why a log takes no events, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from mst.errors import AuditError

MEND = (
    " Look at it with `mst audit verify`; when you know why, go on with: mst audit acknowledge"
    " --reason TEXT. Nothing is done until then."
)


def changed(directory: Path, problem: str) -> AuditError:
    """Return the error for a log that somebody has changed."""
    return AuditError(f"the audit log in {directory} was changed: {problem}.{MEND}")


def gone(directory: Path) -> AuditError:
    """Return the error for a log of which only the key is left."""
    return changed(directory, "its key is there, and its events are gone")


def cannot_write(directory: Path, error: OSError) -> AuditError:
    """Return the error for a log that takes no events."""
    return AuditError(
        f"cannot write the audit log in {directory}: {error.strerror}. Nothing is done without it:"
        " free some space, make the directory writable, or pass another: --audit-log DIR."
    )
