"""The committed files are read by a reader written from docs/format.md alone, and by mst."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mst.seal.keys.ring import KeyRing

VECTORS = Path(__file__).with_name("vectors")
NAMES = sorted(each.stem for each in VECTORS.glob("*.json"))


def independent(
    data: bytes, secret: bytes | str, kind: str = "key-file"
) -> tuple[bytes, list[int]]:
    """Return a file's plaintext and index; it knows the document and nothing of mst."""
    assert data[:10] == bytes.fromhex("894d5354454e430a") + b"\0\1"
    h = 14 + int.from_bytes(data[10:14], "big")
    fixed, header = data[:h], json.loads(data[14:h])
    w = h + 4 + int.from_bytes(data[h : h + 4], "big")
    ways, salt = json.loads(data[h + 4 : w]), bytes.fromhex(header["salt"])

    def k(key: bytes, purpose: str, length: int = 32) -> bytes:
        info = b"mst-file-v1|" + purpose.encode()
        return HKDF(hashes.SHA256(), length, salt, info).derive(key)

    kind = "passphrase" if isinstance(secret, str) else kind
    way = next(each for each in ways if each["kind"] == kind)
    if isinstance(secret, str):
        own, n, r, p = bytes.fromhex(way["salt"]), way["n"], way["r"], way["p"]
        secret = hashlib.scrypt(secret.encode(), salt=own, n=n, r=r, p=p, dklen=32)
    if kind == "pkcs11":
        sealed = bytes.fromhex(way["sealed"])
        secret = AESGCM(secret).decrypt(sealed[:12], sealed[12:], salt)
    wrapped = bytes.fromhex(way["key"])
    data_key = AESGCM(k(secret, "wrap|" + kind)).decrypt(wrapped[:12], wrapped[12:], salt)
    mac = hmac.new(k(data_key, "front"), fixed + data[h:w], hashlib.sha256).digest()
    assert mac == data[w : w + 32]
    suite, prefix = header["suite"], bytes.fromhex(header["prefix"])

    def part(name: str, sealed: bytes) -> bytes:
        step, plain = header["segment"] + 16, b""
        key = k(data_key, f"{name}|{suite}", 16 if suite == "SM4-GCM" else 32)
        cipher: Any = algorithms.SM4(key) if suite == "SM4-GCM" else algorithms.AES(key)
        for n, start in enumerate(range(0, len(sealed), step)):
            piece = sealed[start : start + step]
            nonce = prefix + struct.pack(">IB", n, start + step >= len(sealed))
            opening = Cipher(cipher, modes.GCM(nonce, piece[-16:])).decryptor()
            opening.authenticate_additional_data(hashlib.sha256(fixed).digest())
            plain += opening.update(piece[:-16]) + opening.finalize()
        return plain

    count = max(1, -(-header["bytes"] // header["segment"]))
    middle = w + 32 + header["bytes"] + 16 * count
    index = part("index", data[middle:])
    return part("data", data[w + 32 : middle]), list(struct.unpack(f"<{len(index) // 8}Q", index))


@pytest.mark.parametrize("name", NAMES)
def test_an_independent_reader_reads_them(name: str) -> None:
    vector = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    data = (VECTORS / vector["file"]).read_bytes()
    plain, index = independent(data, bytes.fromhex(vector["key_file_key"]))

    assert plain.decode() == vector["plaintext"]
    assert independent(data, vector["passphrase"]) == (plain, index)
    if "token_key" in vector:
        assert independent(data, bytes.fromhex(vector["token_key"]), "pkcs11") == (plain, index)
    starts = [each & ~(1 << 63) for each in index]
    if name == "records":
        assert starts == [0, 4, 18]
    else:
        lines = plain.splitlines(keepends=True)
        assert [plain[start:].split(b"\n")[0] for start in starts] == [
            each.rstrip(b"\n") for each in lines
        ]
        assert [bool(each >> 63) for each in index] == [not each.strip() for each in lines]


@pytest.mark.parametrize("name", NAMES)
def test_mst_reads_them(name: str) -> None:
    vector = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    for ring in (
        KeyRing((bytes.fromhex(vector["key_file_key"]),)),
        KeyRing((), [vector["passphrase"].encode()]),
    ):
        with ring.open(VECTORS / vector["file"]) as found:
            found.verify()
            plain = b"".join(found.segment(each) for each in range(found.count))

            assert plain.decode() == vector["plaintext"]
            assert found.data_key.hex() == vector["data_key"]
