"""The keys of a server's callers: made at random, shown once, kept as hashes."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mst import serial
from mst.durable import write_text
from mst.errors import MstError, UsageError
from mst.rundir import now

_PREFIX = "mst-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_VERSION = 1


class ApiKeyError(MstError):
    """The file of API keys can't be read or written, or has no such key."""


@dataclass(frozen=True)
class ApiKey:
    """A caller, and what it may do. Its repr shows neither salt nor hash.

    Attributes:
        name: tells callers apart in logs and limits; no secret.
        salt: in hex.
        hash: of salt and key, in hex.
        created: when, in UTC.
        requests_per_minute: at most; None for no limit.
        tokens_per_day: of prompts and answers together, at most; None for no limit.
        models: names that it may ask; empty for all.
    """

    name: str
    salt: str = field(repr=False)
    hash: str = field(repr=False)
    created: str
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyFile:
    """What the file of keys holds."""

    version: int
    keys: tuple[ApiKey, ...] = ()


def default_path() -> Path:
    """Return where keys are kept unless --keys-file says otherwise."""
    import platformdirs

    return platformdirs.user_state_path("mst") / "api-keys.json"


def hashed(key: str, salt: str) -> str:
    """Return the hash of a key, in hex.

    A key is 256 random bits, which nobody guesses however fast the hash is, so BLAKE2b (RFC 7693)
    does: scrypt is for passwords, and would cost each request a tenth of a second.
    """
    return hashlib.blake2b(key.encode(), salt=bytes.fromhex(salt), digest_size=32).hexdigest()


def read(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys in a file; none where there is no file.

    Raises:
        ApiKeyError: it can't be read, is none of ours, or others may look into it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            text = file.read()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ApiKeyError(f"cannot read the API keys in {path}: {reason}.") from None
    if mode & 0o077:
        raise ApiKeyError(
            f"the API keys in {path} have mode {mode:04o}; others must not look into them. Type:"
            f" chmod 600 {path}"
        )
    try:
        plain = json.loads(text)
        found = serial.from_json(KeyFile, plain if isinstance(plain, dict) else {})
    except ValueError:
        found = KeyFile(0)
    if found.version != _VERSION:
        raise ApiKeyError(
            f"{path} is no file of API keys that this mst has written. Name another with"
            " --keys-file, or remove it and make the keys again: mst apikeys add NAME"
        )
    return found.keys


def add(
    path: Path,
    name: str,
    requests_per_minute: int | None = None,
    tokens_per_day: int | None = None,
    models: Sequence[str] = (),
) -> str:
    """Make a key, keep its hash, and return it: this is the only time that it is seen.

    Raises:
        UsageError: the name is none, or taken; or a limit is below 1.
        ApiKeyError: the file can't be read or written.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "a key's name has up to 64 letters, digits and . _ @ - and begins with a letter or a"
            " digit; this one has not."
        )
    for flag, limit in (
        ("--requests-per-minute", requests_per_minute),
        ("--tokens-per-day", tokens_per_day),
    ):
        if limit is not None and limit < 1:
            raise UsageError(f"{flag} must be at least 1; found {limit}.")
    key, salt = _PREFIX + secrets.token_urlsafe(32), secrets.token_hex(16)
    made = ApiKey(
        name,
        salt,
        hashed(key, salt),
        now(),
        requests_per_minute,
        tokens_per_day,
        tuple(models),
    )
    with _locked(path):
        keys = read(path)
        if any(each.name == name for each in keys):
            raise UsageError(
                f"there is a key named {name} already. Choose another name, or take the old one"
                f" away first: mst apikeys remove {name}"
            )
        _write(path, (*keys, made))
    return key


def remove(path: Path, name: str) -> None:
    """Take a key away; a running server refuses it from its next request on.

    Raises:
        ApiKeyError: there is no such key, or the file can't be read or written.
    """
    with _locked(path):
        keys = read(path)
        kept = tuple(each for each in keys if each.name != name)
        if len(kept) == len(keys):
            known = ", ".join(each.name for each in keys) or "none"
            raise ApiKeyError(f"there is no key of that name in {path} (found: {known}).")
        _write(path, kept)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one command at a time change the file."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ApiKeyError(f"cannot keep API keys in {path}: {error.strerror}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, keys: tuple[ApiKey, ...]) -> None:
    try:
        write_text(path, serial.dumps(KeyFile(_VERSION, keys)), 0o600)
    except OSError as error:
        raise ApiKeyError(f"cannot write the API keys to {path}: {error.strerror}.") from None


def owner(keys: Sequence[ApiKey], key: str) -> ApiKey | None:
    """Return whose key it is; None for nobody's. It takes as long for a wrong key as for a right
    one: every hash is made and compared.
    """
    found = None
    for each in keys:
        if hmac.compare_digest(hashed(key, each.salt), each.hash):
            found = each
    return found


def shown(key: ApiKey) -> dict[str, object]:
    """Return what may be shown of a key."""
    return {
        name: value for name, value in serial.to_json(key).items() if name not in ("salt", "hash")
    }
