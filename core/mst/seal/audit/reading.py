"""The events of a log, read back; that they are what was written is `verification`'s to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mst.errors import AuditError
from mst.seal.audit import place


def events(
    directory: Path, since: str | None = None, event: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each event with its line, oldest first.

    Args:
        directory: of the log.
        since: leaves out those before this time, as RFC 3339 writes it, or its beginning.
        event: leaves out those whose name does not begin so.

    Raises:
        AuditError: there is no log, or a line is no event.
    """
    names = place.segments(directory)
    if not names:
        raise AuditError(
            f"{directory} holds no audit log. --audit-log DIR names another directory."
        )
    for name in names:
        with (directory / name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    found = json.loads(line)
                    kept = (since is None or found["time"] >= since) and (
                        event is None or found["event"].startswith(event)
                    )
                except (ValueError, KeyError, TypeError, AttributeError):
                    if not line.endswith(b"\n"):  # being written, or torn
                        return
                    raise AuditError(
                        f"{directory / name}, line {number}, is no event. Type: mst audit verify"
                    ) from None
                if kept:
                    yield line.decode("utf-8").rstrip("\n"), found
