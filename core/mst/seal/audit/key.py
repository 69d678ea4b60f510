"""The key that signs checkpoints: made at first use, readable by its owner alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mst.durable import sync_directory
from mst.errors import AuditError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY = "key"
PUBLIC = "key.pub"


def create(directory: Path) -> Ed25519PrivateKey:
    """Make a key and write it into a directory, 0400, with its public half beside it.

    Raises:
        OSError: it can't be written, or one is there.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = Ed25519PrivateKey.generate()
    secret = made.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / PUBLIC).unlink(missing_ok=True)
    for name, text, mode in (
        (KEY, secret, 0o400),
        (PUBLIC, public_pem(public_hex(made)).encode(), 0o444),
    ):
        handle = os.open(
            directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode
        )
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(text)
            file.flush()
            os.fsync(handle)
    sync_directory(directory)
    return made


def load(directory: Path) -> Ed25519PrivateKey:
    """Return the key of a log.

    Raises:
        AuditError: it is missing, damaged, another's, or others could read or change it.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = directory / KEY
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise AuditError(
            f"the audit log in {directory} has lost its key, {path}. Put it back from a backup, or"
            " go on with a new one, which is logged: mst audit acknowledge --reason TEXT"
        ) from None
    except OSError as error:
        raise AuditError(
            f"cannot read the audit log's key {path}: {error.strerror}. It must be a plain file of"
            " your own with mode 0400."
        ) from None
    with os.fdopen(handle, "rb") as file:
        stat = os.fstat(handle)
        if stat.st_uid != os.geteuid():
            raise AuditError(
                f"the audit log's key {path} belongs to user {stat.st_uid}, not to you"
                f" ({os.geteuid()}). Keep a log of your own: --audit-log DIR."
            )
        if stat.st_mode & 0o7377:
            raise AuditError(
                f"the audit log's key {path} has mode {stat.st_mode & 0o7777:04o}; it must be 0400,"
                f" so that nobody else can sign. Type: chmod 400 {path}. If others could read it,"
                " move the log away and begin a new one."
            )
        text = file.read()
    try:
        loaded = load_pem_private_key(text, password=None)
    except (ValueError, TypeError):
        loaded = None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise AuditError(
            f"the audit log's key {path} is damaged. Put it back from a backup; or remove it, and"
            " go on with a new one: mst audit acknowledge --reason TEXT"
        )
    return loaded


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half: 32 bytes (RFC 8032) in hexadecimal."""
    return key.public_key().public_bytes_raw().hex()


def public_pem(public: str) -> str:
    """Return a public key as PEM (RFC 8410), which openssl reads."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return (
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode("ascii")
    )


def read_public(path: Path) -> str:
    """Return the public key in a PEM file, as 32 bytes in hexadecimal.

    Raises:
        AuditError: there is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        loaded = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise AuditError(f"cannot read the public key {path}: {error.strerror}.") from None
    except ValueError:
        loaded = None
    if not isinstance(loaded, Ed25519PublicKey):
        raise AuditError(
            f"{path} holds no public Ed25519 key in PEM. `mst audit key` prints a log's."
        )
    return loaded.public_bytes_raw().hex()


def is_signed(public: str, signature: str, message: bytes) -> bool:
    """Return whether a signature in hexadecimal is the key's over the message."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            bytes.fromhex(signature), message
        )
    except (InvalidSignature, ValueError):
        return False
    return True
