"""A file's own keys, and its segments one at a time.

Segments follow STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015, "Online Authenticated-Encryption
and its Nonce-Reuse Misuse-Resistance", section 7), as Tink's AES-GCM-HKDF streams do: the nonce is
a random prefix, the segment's number, and whether it is the last one.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Any

from mst.errors import EncryptionError
from mst.seal.container.layout import TAG_BYTES, Front, Header

DATA, INDEX = b"data", b"index"
_KEY_BYTES = {"AES-256-GCM": 32, "SM4-GCM": 16}


def derived(key: bytes, salt: bytes, purpose: bytes, length: int = 32) -> bytes:
    """Return HKDF-SHA256 (RFC 5869) of a key; no two purposes share a key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), length, salt, b"mst-file-v1|" + purpose).derive(key)


def front_mac(data_key: bytes, header: Header, fixed: bytes, wrapping_bytes: bytes) -> bytes:
    """Return what authenticates the header and the ways to the key.

    It commits to the data key too, which GCM alone does not (Len, Grubbs, Ristenpart 2021,
    "Partitioning Oracle Attacks").
    """
    key = derived(data_key, header.salt, b"front")
    return hmac.new(key, fixed + wrapping_bytes, hashlib.sha256).digest()


def is_key_of(data_key: bytes, front: Front) -> bool:
    """Return whether a key opens a file whose front is as it was written."""
    found = front_mac(data_key, front.header, front.fixed, front.wrapping_bytes)
    return hmac.compare_digest(found, front.mac)


class Segments:
    """Seals and opens the segments of one part of a file, each by its number."""

    def __init__(self, data_key: bytes, header: Header, fixed: bytes, part: bytes) -> None:
        """Derive the part's key.

        Args:
            data_key: 32 bytes, the file's own.
            header: says the suite.
            fixed: the header's bytes, bound to every segment.
            part: `DATA` or `INDEX`.
        """
        purpose = part + b"|" + header.suite.encode()
        key = derived(data_key, header.salt, purpose, _KEY_BYTES[header.suite])
        self._cipher = _cipher(header.suite, key)
        self._prefix = header.prefix
        self._bound = hashlib.sha256(fixed).digest()

    def _nonce(self, number: int, last: bool) -> bytes:
        return self._prefix + struct.pack(">I?", number, last)

    def seal(self, number: int, last: bool, plain: Any) -> bytes:
        """Return a segment's ciphertext and tag."""
        sealed: bytes = self._cipher.encrypt(self._nonce(number, last), plain, self._bound)
        return sealed

    def open(self, number: int, last: bool, sealed: Any) -> bytes | None:
        """Return a segment's plaintext; None when it is not authentic."""
        from cryptography.exceptions import InvalidTag

        try:
            plain: bytes = self._cipher.decrypt(self._nonce(number, last), sealed, self._bound)
        except (InvalidTag, ValueError):
            return None
        return plain


def _cipher(suite: str, key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key) if suite == "AES-256-GCM" else _Sm4Gcm(key)


class _Sm4Gcm:
    """SM4-GCM (GB/T 32907-2016, RFC 8998) with the interface of AESGCM."""

    def __init__(self, key: bytes) -> None:
        from cryptography.exceptions import UnsupportedAlgorithm

        self._key = key
        try:
            self._context(b"\0" * 12, None).encryptor()
            return
        except UnsupportedAlgorithm:
            pass
        raise EncryptionError(
            "SM4-GCM was asked for, but the OpenSSL that the cryptography package brings was built"
            " without it. Use --suite AES-256-GCM, or a cryptography built with SM4."
        )

    def _context(self, nonce: bytes, tag: bytes | None) -> Any:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        return Cipher(algorithms.SM4(self._key), modes.GCM(nonce, tag))

    def encrypt(self, nonce: bytes, plain: Any, bound: bytes) -> bytes:
        context = self._context(nonce, None).encryptor()
        context.authenticate_additional_data(bound)
        sealed: bytes = context.update(plain) + context.finalize() + context.tag
        return sealed

    def decrypt(self, nonce: bytes, sealed: Any, bound: bytes) -> bytes:
        context = self._context(nonce, bytes(sealed[-TAG_BYTES:])).decryptor()
        context.authenticate_additional_data(bound)
        plain: bytes = context.update(sealed[:-TAG_BYTES]) + context.finalize()
        return plain
