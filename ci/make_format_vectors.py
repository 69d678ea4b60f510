"""Write the vectors of docs/format.md anew: `python ci/make_format_vectors.py`."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mst.seal.container.cipher import derived
from mst.seal.container.layout import Header
from mst.seal.container.writer import write
from mst.seal.keys.wrapping import KeyFileWay, PassphraseWay

TARGET = Path(__file__).resolve().parents[1] / "tests/core/seal/vectors"
KEY, DATA_KEY = bytes(range(32)), bytes(range(32, 64))
TOKEN_KEY = bytes(range(64, 96))
PASSPHRASE = "correct horse battery staple"
LINES = "".join(f'{{"prompt":"{n} 你好","response":"{"yes" * n}"}}\n' for n in range(90))
CASES = {
    "lines": ("AES-256-GCM", ".jsonl", LINES[:600] + "\n \n" + LINES[600:]),
    "records": ("AES-256-GCM", ".csv", 'a,b\n1,"two\nlines"\n3,"say ""four"""'),
    "sm4": ("SM4-GCM", ".txt", LINES),
    "empty": ("AES-256-GCM", ".txt", ""),
    "token": ("AES-256-GCM", ".jsonl", LINES[:600]),
}


def token_way(salt: bytes) -> Mapping[str, Any]:
    """Return the way that a token writes which holds TOKEN_KEY."""
    own = secrets.token_bytes(32)

    def sealed(key: bytes, plain: bytes) -> str:
        nonce = secrets.token_bytes(12)
        return (nonce + AESGCM(key).encrypt(nonce, plain, salt)).hex()

    return {
        "kind": "pkcs11",
        "uri": "pkcs11:token=my%20token;object=rows",
        "sealed": sealed(TOKEN_KEY, own),
        "key": sealed(derived(own, salt, b"wrap|pkcs11"), DATA_KEY),
    }


def main() -> None:
    """Write one encrypted file and one description a case."""
    TARGET.mkdir(exist_ok=True)
    for number, (name, (suite, ending, text)) in enumerate(CASES.items()):
        plain = text.encode()
        salt = bytes([number]) * 32
        header = Header(suite, 4096, salt, bytes(range(number, number + 7)), ending, len(plain))
        ways = [
            KeyFileWay(KEY).wrap(DATA_KEY, salt),
            PassphraseWay(PASSPHRASE.encode(), cost=1 << 10).wrap(DATA_KEY, salt),
        ]
        described = {
            "file": f"{name}{ending}.mst",
            "key_file_key": KEY.hex(),
            "passphrase": PASSPHRASE,
            "data_key": DATA_KEY.hex(),
            "plaintext": text,
        }
        if name == "token":
            ways.append(token_way(salt))
            described["token_key"] = TOKEN_KEY.hex()
        with (
            tempfile.TemporaryFile() as source,
            (TARGET / f"{name}{ending}.mst").open("wb") as target,
        ):
            source.write(plain)
            source.seek(0)
            write(source, target, header, DATA_KEY, tuple(ways))
        document = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (TARGET / f"{name}.json").write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
