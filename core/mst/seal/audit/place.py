"""Where the audit log lies: its directory, who may look into it, and the names of its files."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from mst.errors import AuditError

HEAD = "head.json"
_SEGMENT = re.compile(r"[0-9]{6}\.jsonl")
_SETTINGS = "audit.toml"


def directory_of(asked: str | None) -> Path:
    """Return the log's directory, which need not be there.

    Args:
        asked: what `--audit-log` says; it wins over the settings of the user, those over the
            machine's, and those over the default, mst/audit in the user's state directory.

    Raises:
        AuditError: a file of settings can't be used.
    """
    import platformdirs

    if asked:
        return Path(asked).expanduser().absolute()
    for folder in (platformdirs.user_config_path("mst"), platformdirs.site_config_path("mst")):
        found = _configured(folder / _SETTINGS)
        if found is not None:
            return found
    return platformdirs.user_state_path("mst") / "audit"


def _configured(path: Path) -> Path | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        raise AuditError(f"cannot read {path}. Mend it, or pass --audit-log DIR.") from None
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        values = {}
    directory = values.get("directory")
    if list(values) != ["directory"] or not isinstance(directory, str) or not directory:
        raise AuditError(
            f'{path} must hold one line, directory = "…", with the directory of the audit log.'
        )
    return Path(directory).expanduser().absolute()


def prepare_directory(path: Path) -> None:
    """Make the log's directory where it isn't, and see that it is the user's alone.

    Raises:
        AuditError: it can't be made, is another's, or others can look into it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        stat = path.stat()
    except OSError as error:
        raise AuditError(
            f"cannot make the audit log's directory {path}: {error.strerror}. Nothing is done"
            " without a log; pass --audit-log DIR with one that can be written."
        ) from None
    if stat.st_uid != os.geteuid():
        raise AuditError(
            f"the audit log's directory {path} belongs to user {stat.st_uid}, not to you"
            f" ({os.geteuid()}). Keep a log of your own: --audit-log DIR."
        )
    if stat.st_mode & 0o077:
        raise AuditError(
            f"the audit log's directory {path} has mode {stat.st_mode & 0o7777:04o}; others must"
            f" not look into it. Type: chmod 700 {path}"
        )


def segments(directory: Path) -> list[str]:
    """Return the names of a log's files, in order; [] where there is no log."""
    try:
        return sorted(each for each in os.listdir(directory) if _SEGMENT.fullmatch(each))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AuditError(f"cannot read the audit log in {directory}: {error.strerror}.") from None


def segment_name(number: int) -> str:
    """Return the name of the file with this number, from 1."""
    return f"{number:06}.jsonl"


def segment_number(name: str) -> int:
    """Return the number in a file's name."""
    return int(name[:6])
