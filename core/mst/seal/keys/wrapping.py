"""Ways to a file's data key: each wraps it with AES-256-GCM under a key of its own kind."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mst.errors import EncryptionError
from mst.seal.container.cipher import derived
from mst.seal.keys.credential import open_credential, seal_credential
from mst.seal.keys.key_file import key_id
from mst.seal.keys.passphrase import BLOCK, COST, PARALLEL, passphrase_key
from mst.seal.keys.token import TokenKey, open_on_token, seal_on_token
from mst.seal.keys.token_uri import is_printable

KEY_FILE, PASSPHRASE, CREDENTIAL, TOKEN = "key-file", "passphrase", "systemd-creds", "pkcs11"


@dataclass(frozen=True)
class KeyFileWay:
    """Opens with a key file."""

    key: bytes = field(repr=False)

    def wrap(self, data_key: bytes, salt: bytes) -> Mapping[str, Any]:
        """Return the way as it is written."""
        return {
            "kind": KEY_FILE,
            "id": key_id(self.key),
            "key": _wrapped(self.key, data_key, salt, KEY_FILE),
        }


@dataclass(frozen=True)
class PassphraseWay:
    """Opens with a passphrase; `cost` is scrypt's N."""

    passphrase: bytes = field(repr=False)
    cost: int = COST

    def wrap(self, data_key: bytes, salt: bytes) -> Mapping[str, Any]:
        """Return the way as it is written."""
        own = secrets.token_bytes(16)
        key = passphrase_key(self.passphrase, own, self.cost, BLOCK, PARALLEL)
        return {
            "kind": PASSPHRASE,
            "salt": own.hex(),
            "n": self.cost,
            "r": BLOCK,
            "p": PARALLEL,
            "key": _wrapped(key, data_key, salt, PASSPHRASE),
        }


@dataclass(frozen=True)
class CredentialWay:
    """Opens on this machine alone."""

    def wrap(self, data_key: bytes, salt: bytes) -> Mapping[str, Any]:
        """Return the way as it is written."""
        key = secrets.token_bytes(32)
        return {
            "kind": CREDENTIAL,
            "sealed": seal_credential(key),
            "key": _wrapped(key, data_key, salt, CREDENTIAL),
        }


@dataclass(frozen=True)
class TokenWay:
    """Opens with a key on a PKCS#11 token."""

    key: TokenKey

    def wrap(self, data_key: bytes, salt: bytes) -> Mapping[str, Any]:
        """Return the way as it is written."""
        key = secrets.token_bytes(32)
        uri, sealed = seal_on_token(self.key, key, salt)
        return {
            "kind": TOKEN,
            "uri": uri,
            "sealed": sealed.hex(),
            "key": _wrapped(key, data_key, salt, TOKEN),
        }


def unwrap_key_file(way: Mapping[str, Any], key: bytes, salt: bytes) -> bytes | None:
    """Return the data key; None when this key file doesn't open it."""
    return _unwrapped(key, way, salt)


def unwrap_passphrase(way: Mapping[str, Any], passphrase: bytes, salt: bytes) -> bytes | None:
    """Return the data key; None when the passphrase is wrong.

    Raises:
        EncryptionError: the file asks for a cost that is not allowed.
    """
    try:
        own = bytes.fromhex(way["salt"])
        cost = (way["n"], way["r"], way["p"])
    except (KeyError, TypeError, ValueError):
        return None
    return _unwrapped(passphrase_key(passphrase, own, *cost), way, salt)


def unwrap_credential(way: Mapping[str, Any], salt: bytes, file: str) -> bytes | None:
    """Return the data key that was sealed to this machine; None when it was changed.

    Raises:
        EncryptionError: as `mst.seal.keys.credential.open_credential`.
    """
    sealed = way.get("sealed")
    if not isinstance(sealed, str):
        return None
    return _unwrapped(open_credential(sealed, file), way, salt)


def unwrap_token(way: Mapping[str, Any], key: TokenKey, salt: bytes) -> bytes | None:
    """Return the data key; None when this token's key doesn't open it.

    Raises:
        EncryptionError: as `mst.seal.keys.token.open_on_token`.
    """
    try:
        sealed = bytes.fromhex(way["sealed"])
    except (KeyError, TypeError, ValueError):
        return None
    found = open_on_token(key, sealed, salt) if len(sealed) == 12 + 32 + 16 else None
    return None if found is None else _unwrapped(found, way, salt)


def described(way: Mapping[str, Any]) -> str:
    """Return a way in words that hold no secret, safe to print whoever wrote them."""
    kind, name = str(way["kind"]), way.get("id")
    if kind not in (KEY_FILE, PASSPHRASE, CREDENTIAL, TOKEN):
        return "a kind that this mst doesn't know"
    if kind == TOKEN and is_printable(way.get("uri")):
        return str(way["uri"])
    known = isinstance(name, str) and len(name) == 16 and name.isascii() and name.isalnum()
    return f"{kind} {name}" if kind == KEY_FILE and known else kind


def _wrapped(key: bytes, data_key: bytes, salt: bytes, kind: str) -> str:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = secrets.token_bytes(12)
    # The file's salt in the derivation gives each file a wrapping key of its own, so random
    # nonces never come near their limit, and a way can't be moved to another file.
    cipher = AESGCM(derived(key, salt, b"wrap|" + kind.encode()))
    return (nonce + cipher.encrypt(nonce, data_key, salt)).hex()


def _unwrapped(key: bytes, way: Mapping[str, Any], salt: bytes) -> bytes | None:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        sealed = bytes.fromhex(way["key"])
        if len(key) != 32 or len(sealed) != 12 + 32 + 16:
            return None
        cipher = AESGCM(derived(key, salt, b"wrap|" + str(way["kind"]).encode()))
        return cipher.decrypt(sealed[:12], sealed[12:], salt)
    except (KeyError, TypeError, ValueError, InvalidTag):
        return None


def refuse_none(ways: tuple[object, ...]) -> None:
    """Raise EncryptionError when there is no way to the key: nobody could ever read the file."""
    if not ways:
        raise EncryptionError(
            "no key was named, and without one nobody could read the file again. Pass --key-file"
            " FILE (made by `mst data keygen --key-file FILE`), --passphrase, --systemd-creds or"
            " --pkcs11 URI."
        )
