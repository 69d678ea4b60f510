"""What gptqmodel keeps to go on after a kill, encrypted: it holds what the rows became so far.

Activations of the first layers can be turned back into the rows. The key is made of the rows
themselves: whoever goes on has them, and nobody else learns anything from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from typing import Any

# AESGCM takes less than 2 GiB at once.
_CHUNK_BYTES = 1 << 26
_NONCE_BYTES = 12


def key_from_rows(rows: Sequence[Sequence[int]]) -> bytes:
    """Return 32 bytes that only the same token ids in the same order give again."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    digest = hashlib.sha256(json.dumps(rows).encode()).digest()
    return HKDF(SHA256(), 32, salt=None, info=b"mst export: continuation").derive(digest)


def seal(plain: bytes, key: bytes) -> bytes:
    """Return a text encrypted with AES-256-GCM, chunk by chunk; none can be left out or moved."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher, sealed = AESGCM(key), bytearray(struct.pack(">Q", len(plain)))
    for start in range(0, len(plain), _CHUNK_BYTES):
        nonce = os.urandom(_NONCE_BYTES)
        place = struct.pack(">QQ", start, len(plain))
        sealed += nonce + cipher.encrypt(nonce, plain[start : start + _CHUNK_BYTES], place)
    return bytes(sealed)


def unseal(sealed: bytes, key: bytes) -> bytes:
    """Return the text that `seal` encrypted.

    Raises:
        cryptography.exceptions.InvalidTag: it was changed, or the key is another.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher, plain = AESGCM(key), bytearray()
    (length,) = struct.unpack(">Q", sealed[:8])
    at = 8
    for start in range(0, length, _CHUNK_BYTES):
        end = at + _NONCE_BYTES + min(_CHUNK_BYTES, length - start) + 16
        nonce, text = sealed[at : at + _NONCE_BYTES], sealed[at + _NONCE_BYTES : end]
        plain += cipher.decrypt(nonce, text, struct.pack(">QQ", start, length))
        at = end
    return bytes(plain)


def sealed_codec(codec: Any, key: bytes) -> Any:
    """Return gptqmodel's codec of continuations, with encryption around it.

    Args:
        codec: `gptqmodel.looper.continuation.ContinuationCodec`.
        key: from `key_from_rows`.
    """

    class SealedCodec:
        @staticmethod
        def dumps(state: object) -> bytes:
            return seal(codec.dumps(state), key)

        @staticmethod
        def loads(data: bytes) -> Any:
            return codec.loads(unseal(data, key))

    return SealedCodec
