"""The keys that a command was given, and how they reach its workers."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.errors import EncryptionError
from mst.seal.container.layout import Front
from mst.seal.container.reader import SealedFile
from mst.seal.keys import wrapping
from mst.seal.keys.key_file import key_id, read_key_file
from mst.seal.keys.passphrase import ask_passphrase, has_terminal, read_passphrase
from mst.seal.keys.token import TokenKey, token_key

_MAX_BYTES = 1 << 22


@dataclass(frozen=True)
class KeyRing:
    """Secrets, and the data keys that they have opened. Its repr holds neither.

    Attributes:
        key_files: the keys of --key-file.
        passphrases: of --passphrase-file, and those that were asked for.
        opened: data keys and the names of the ways to them, by the salt of their file, in hex.
        asks: a passphrase may be asked for at the terminal.
        tokens: the keys of --pkcs11. Workers get what these have opened, and not the tokens.
    """

    key_files: tuple[bytes, ...] = field(default=(), repr=False)
    passphrases: list[bytes] = field(default_factory=list, repr=False)
    opened: dict[str, tuple[bytes, str]] = field(default_factory=dict, repr=False)
    asks: bool = False
    tokens: tuple[TokenKey, ...] = ()

    def data_key(self, name: str, front: Front) -> bytes:
        """Return the data key of a file; a scrypt or a sealed credential is opened once.

        Args:
            name: of the file, for messages.
            front: as it was read.

        Raises:
            EncryptionError: no secret of the ring opens it.
        """
        salt = front.header.salt
        known = self.opened.get(salt.hex())
        if known is not None:
            return known[0]
        found = _find(self, name, front)
        self.opened[salt.hex()] = found
        return found[0]

    def open(self, path: Path) -> SealedFile:
        """Open an encrypted file.

        Raises:
            EncryptionError: as `SealedFile`.
        """
        return SealedFile(path, self.data_key)

    def way_to(self, sealed: SealedFile) -> str:
        """Return the name of the key that opened a file; it holds no secret."""
        return self.opened[sealed.front.header.salt.hex()][1]


# What is read without keys: a file that needs one says which option to pass.
NO_KEYS = KeyRing()


def ring_of(
    key_file: str | None,
    passphrase_file: str | None,
    pkcs11: str | None = None,
    asks: bool = True,
) -> KeyRing:
    """Return the secrets that a command's options name.

    Raises:
        EncryptionError: one can't be read, or others may read it.
        UsageError: `pkcs11` is no URI of a key.
    """
    keys = () if key_file is None else (read_key_file(Path(key_file).expanduser()),)
    phrases = []
    if passphrase_file is not None:
        phrases.append(read_passphrase(Path(passphrase_file).expanduser()))
    tokens = () if pkcs11 is None else (token_key(pkcs11),)
    return KeyRing(keys, phrases, {}, asks, tokens)


def _find(ring: KeyRing, name: str, front: Front) -> tuple[bytes, str]:
    salt = front.header.salt
    ways = {kind: [each for each in front.wrappings if each["kind"] == kind] for kind in _KINDS}
    # By the key and not by the id alone: an id in a header is a stranger's word.
    for key in ring.key_files:
        for way in ways[wrapping.KEY_FILE]:
            if (found := wrapping.unwrap_key_file(way, key, salt)) is not None:
                return found, f"{wrapping.KEY_FILE} {key_id(key)}"
    # One passphrase is tried on one way of a file: a file can't ask for scrypt a hundred times.
    for phrase in ring.passphrases:
        for way in ways[wrapping.PASSPHRASE][:_PASSPHRASE_WAYS]:
            if (found := wrapping.unwrap_passphrase(way, phrase, salt)) is not None:
                return found, wrapping.PASSPHRASE
    for token in ring.tokens:
        for way in ways[wrapping.TOKEN][:_TOKEN_WAYS]:
            if (found := wrapping.unwrap_token(way, token, salt)) is not None:
                return found, wrapping.described(way)
    given = bool(ring.key_files or ring.passphrases or ring.tokens)
    for way in ways[wrapping.CREDENTIAL][: 0 if given else 1]:
        if (found := wrapping.unwrap_credential(way, salt, name)) is not None:
            return found, wrapping.CREDENTIAL
    if ways[wrapping.PASSPHRASE] and not given and ring.asks and has_terminal():
        ring.passphrases.append(ask_passphrase(name))
        return _find(ring, name, front)
    raise _closed(ring, name, front.wrappings)


_KINDS = (wrapping.KEY_FILE, wrapping.PASSPHRASE, wrapping.CREDENTIAL, wrapping.TOKEN)
_PASSPHRASE_WAYS = _TOKEN_WAYS = 4


def _closed(ring: KeyRing, name: str, ways: tuple[Mapping[str, Any], ...]) -> EncryptionError:
    known = ", ".join(sorted({wrapping.described(each) for each in ways})[:8]) or "nothing"
    if not (ring.key_files or ring.passphrases or ring.tokens):
        return EncryptionError(
            f"{name} is encrypted, and no key was given. It opens with: {known}. Pass --key-file"
            " FILE, --passphrase-file FILE or --pkcs11 URI."
        )
    tried = [f"key-file {key_id(each)}" for each in ring.key_files]
    tried += ["a passphrase"] * bool(ring.passphrases)
    tried += ["the token's key"] * bool(ring.tokens)
    return EncryptionError(
        f"{name} does not open with {' or '.join(tried)}: the key is wrong, or the file's header"
        f" was changed. It says that it opens with: {known}. Pass that key."
    )


@contextlib.contextmanager
def handed_down(ring: KeyRing) -> Iterator[int | None]:
    """Yield an open file descriptor that holds a ring, for workers to inherit; None for no keys.

    It is memory without a name on any disk; neither a command line nor an environment holds it.
    """
    if not (ring.key_files or ring.passphrases or ring.opened):
        yield None
        return
    text = json.dumps(secrets_of(ring))
    handle = os.memfd_create("mst-keys", os.MFD_CLOEXEC)
    try:
        os.write(handle, text.encode())
        yield handle
    finally:
        os.close(handle)


def inherited(handle: int | None) -> KeyRing:
    """Return the ring that a parent handed down.

    Args:
        handle: as `handed_down` gave it. Several workers share it, so it is read without a seek.
    """
    if handle is None:
        return NO_KEYS
    found = json.loads(os.pread(handle, _MAX_BYTES, 0))
    os.close(handle)
    return ring_with(found)


def secrets_of(ring: KeyRing) -> dict[str, Any]:
    """Return what `ring_with` takes, plain enough for JSON; tokens stay where they are."""
    return {
        "key_files": [each.hex() for each in ring.key_files],
        "passphrases": [each.hex() for each in ring.passphrases],
        "opened": {salt: [key.hex(), way] for salt, (key, way) in ring.opened.items()},
    }


def ring_with(found: Mapping[str, Any]) -> KeyRing:
    """Return a ring of secrets that another process had."""
    return KeyRing(
        tuple(map(bytes.fromhex, found["key_files"])),
        list(map(bytes.fromhex, found["passphrases"])),
        {salt: (bytes.fromhex(key), way) for salt, (key, way) in found["opened"].items()},
    )
