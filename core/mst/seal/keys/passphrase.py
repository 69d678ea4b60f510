"""Passphrases, and the keys that scrypt makes of them (RFC 7914)."""

from __future__ import annotations

import getpass
import hashlib
import os
from pathlib import Path

from mst.errors import EncryptionError
from mst.seal.keys.key_file import read_secret

# OWASP's password storage cheat sheet, 2025: N = 2^17, r = 8, p = 1; 128 MiB and 0.3 s.
COST, BLOCK, PARALLEL = 1 << 17, 8, 1
# What a file may ask of a reader: 1 GiB, and eight times our own work.
_MAX_MEMORY_BYTES = 1 << 30
_MAX_WORK = 8 * COST * BLOCK * PARALLEL
_MIN_BYTES = 8
_MAX_BYTES = 1024


def passphrase_key(passphrase: bytes, salt: bytes, cost: int, block: int, parallel: int) -> bytes:
    """Return the 32 bytes that scrypt makes of a passphrase.

    Args:
        passphrase: UTF-8.
        salt: random.
        cost: scrypt's N, a power of two.
        block: scrypt's r.
        parallel: scrypt's p.

    Raises:
        EncryptionError: the file asks for more memory or time than a reader gives.
    """
    numbers = (cost, block, parallel)
    sane = all(type(each) is int and each > 0 for each in numbers) and cost > 1
    if (
        not sane
        or cost & (cost - 1)
        or 128 * cost * block > _MAX_MEMORY_BYTES
        or cost * block * parallel > _MAX_WORK
    ):
        raise EncryptionError(
            "the file asks for a passphrase at a cost that no file of mst has (more than"
            f" {_MAX_MEMORY_BYTES >> 20} MiB of memory, or no scrypt at all), so it was changed."
            " Copy it again from where it came."
        )
    memory = 128 * block * (cost + parallel + 2)
    return hashlib.scrypt(
        passphrase, salt=salt, n=cost, r=block, p=parallel, maxmem=memory + (1 << 20), dklen=32
    )


def read_passphrase(path: Path) -> bytes:
    """Return the first line of a file or of /dev/fd/N, without its end.

    Raises:
        EncryptionError: others may read it, or it is empty or short.
    """
    data = read_secret(path, "--passphrase-file", _MAX_BYTES)
    return _checked(data.split(b"\n", 1)[0].rstrip(b"\r"), f"--passphrase-file {path}")


def ask_passphrase(file: str, new: bool = False) -> bytes:
    """Ask at the terminal; nothing is echoed.

    Args:
        file: what it is for.
        new: ask twice.

    Raises:
        EncryptionError: there is no terminal, or the two differ.
    """
    if not has_terminal():
        raise EncryptionError(
            f"a passphrase for {file} is needed, and there is no terminal to ask at. Pass"
            " --passphrase-file FILE, which may be /dev/fd/N."
        )
    text = getpass.getpass(f"{'New passphrase' if new else 'Passphrase'} for {file}: ")
    if new and getpass.getpass("The same again: ") != text:
        raise EncryptionError("the two passphrases differ; nothing was written. Try again.")
    return _checked(text.encode(), "the passphrase")


def has_terminal() -> bool:
    """Return whether somebody can be asked."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _checked(passphrase: bytes, name: str) -> bytes:
    if len(passphrase) < _MIN_BYTES:
        raise EncryptionError(
            f"{name} has {len(passphrase)} bytes, and at least {_MIN_BYTES} are needed: a short one"
            " is guessed. Five random words do well."
        )
    return passphrase
