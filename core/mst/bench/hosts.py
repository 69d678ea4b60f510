"""A list of machines and the files of their results, where no machine may talk to another."""

from __future__ import annotations

from pathlib import Path

from mst.errors import UsageError


def read_hosts(path: Path) -> list[tuple[str, Path]]:
    """Return each machine's name and its file of results.

    Args:
        path: of a text with a line a machine, `NAME FILE`; files are looked up beside it. Lines
            that begin with # are passed over.

    Raises:
        UsageError: it can't be read, a line is no such pair, or a name is there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read --hosts {path}: {reason}.") from None
    found: dict[str, Path] = {}
    for number, line in enumerate(lines, 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2:
            raise UsageError(
                f"--hosts {path}, line {number}: a line is NAME FILE, such as `ward-1 ward-1.json`;"
                f" found {line.strip()!r}."
            )
        if words[0] in found:
            raise UsageError(f"--hosts {path}, line {number}: {words[0]} is there twice.")
        found[words[0]] = path.parent / words[1].strip()
    if not found:
        raise UsageError(f"--hosts {path} names no machine. A line is NAME FILE.")
    return list(found.items())


def present(hosts: list[tuple[str, Path]]) -> tuple[list[str], list[str]]:
    """Return the files that are there, and a note for each machine whose file is not."""
    there = [str(file) for _, file in hosts if file.exists()]
    notes = [
        f"no results of {name}: {file} is not there" for name, file in hosts if not file.exists()
    ]
    return there, notes
