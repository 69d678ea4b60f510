"""Key files: 32 random bytes as text, readable by their owner alone."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import stat
from pathlib import Path

from mst.errors import EncryptionError, UsageError
from mst.seal.container.output import refuse_existing, whole_file

_MARK = "mst-key-v1:"
_MAX_BYTES = 4096


def key_id(key: bytes) -> str:
    """Return what a key is called in files and logs; it tells nothing of the key."""
    return hashlib.sha256(b"mst-key-id|" + key).hexdigest()[:16]


def make_key_file(path: Path) -> str:
    """Write a new key, mode 0400, and return its id.

    Raises:
        EncryptionError: the file exists, or can't be written.
    """
    refuse_existing(path)
    key = secrets.token_bytes(32)
    name = key_id(key)
    with whole_file(path, mode=0o400) as file:
        file.write(key_text(key).encode())
    return name


def key_text(key: bytes) -> str:
    """Return what a key file holds."""
    return (
        f"# Key {key_id(key)} of mst data. Who has it reads what it encrypts; without it nobody"
        f" does.\n{_MARK}{base64.b64encode(key).decode()}\n"
    )


def key_of_text(text: str) -> bytes | None:
    """Return the key that a key file's text holds; None when it holds none."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    keys = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]
    try:
        key = base64.b64decode(keys[0], validate=True) if len(keys) == 1 else b""
    except ValueError:
        return None
    return key if len(key) == 32 else None


def read_key_file(path: Path) -> bytes:
    """Return the key that a file holds.

    Raises:
        EncryptionError: it is no key file, or others than its owner may read it.
    """
    text = read_secret(path, "--key-file", _MAX_BYTES).decode("ascii", "replace")
    key = key_of_text(text)
    if key is None:
        raise EncryptionError(
            f"--key-file {path} is no key file: a line that begins with {_MARK} and 32 bytes in"
            f" base64 is expected. Make one: mst data keygen --key-file NEW"
        )
    return key


def read_secret(path: Path, flag: str, max_bytes: int) -> bytes:
    """Return a secret that a file, pipe or file descriptor (/dev/fd/N) holds.

    Args:
        path: where.
        flag: that named it.
        max_bytes: more is refused.

    Raises:
        EncryptionError: it can't be read, is too long, or others may read it.
    """
    problem = ""
    try:
        # Opened once, and judged by what was opened. A pipe that nobody writes to would block.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(handle)
            if stat.S_ISREG(facts.st_mode):
                _refuse_exposed(path, flag, facts)
            data = file.read(max_bytes + 1)
    except OSError as error:
        problem = error.strerror or type(error).__name__
    if problem:
        raise EncryptionError(
            f"{flag} {path} could not be read: {problem}. Pass a file of your own."
        )
    if len(data) > max_bytes:
        raise EncryptionError(
            f"{flag} {path} is longer than {max_bytes} bytes. Pass the right file."
        )
    return data


def read_word(path: Path, flag: str) -> str:
    """Return a secret that is one word, such as an API key or the token of an account.

    Args:
        path: of a file, pipe or file descriptor that holds it.
        flag: that named it.

    Raises:
        EncryptionError: it can't be read, or others may read it.
        UsageError: it holds something else.
    """
    text = read_secret(path, flag, _MAX_BYTES).decode("ascii", "replace").strip()
    if not text.isascii() or not text.isprintable() or len(text.split()) != 1:
        raise UsageError(f"{flag} {path} must hold one word on one line, as it was given to you.")
    return text


def _refuse_exposed(path: Path, flag: str, facts: os.stat_result) -> None:
    if facts.st_mode & 0o077:
        raise EncryptionError(
            f"{flag} {path} can be read or changed by others than its owner (mode"
            f" {stat.S_IMODE(facts.st_mode):04o}), so it is no secret. Run: chmod 0400 {path}"
        )
    if facts.st_uid not in (os.geteuid(), 0):
        raise EncryptionError(
            f"{flag} {path} belongs to user {facts.st_uid}, who can replace it; you are"
            f" {os.geteuid()}. Copy it to a file of your own, mode 0400."
        )
