"""An encrypted run's own key: drawn once, and kept in the run under the keys that the user gave.

Every file of the run is encrypted with it. So a passphrase costs its scrypt once a command and not
once a file, and `mst data rekey` of one small file changes which keys open the whole run.
"""

from __future__ import annotations

import io
import secrets
from pathlib import Path

from mst.errors import EncryptionError
from mst.seal.container.layout import read_front
from mst.seal.container.output import whole_file
from mst.seal.container.reader import PlainBytes
from mst.seal.container.writer import Wrap, encrypt
from mst.seal.keys.key_file import key_of_text, key_text
from mst.seal.keys.ring import KeyRing
from mst.seal.keys.wrapping import KeyFileWay, PassphraseWay, TokenWay, refuse_none

RUN_KEY = "run.key.mst"


def make_run_key(run: Path, keys: KeyRing) -> None:
    """Write a new key into a run directory; each of the user's keys opens it.

    Raises:
        EncryptionError: there is no key, or it can't be written.
    """
    ways: tuple[Wrap, ...] = (
        *map(KeyFileWay, keys.key_files),
        *map(PassphraseWay, keys.passphrases),
        *map(TokenWay, keys.tokens),
    )
    refuse_none(ways)
    text = key_text(secrets.token_bytes(32)).encode()
    with whole_file(run / RUN_KEY) as target:
        encrypt(io.BytesIO(text), target, ".key", ways, size=len(text))
    # That it opens is seen before anything is encrypted with it; the ring keeps what scrypt found.
    run_keys(run, keys)


def first_way(run: Path) -> str:
    """Return the kind of key that a run's own key was first wrapped with; needs no key."""
    with (run / RUN_KEY).open("rb") as file:
        kind: str = read_front(RUN_KEY, file).wrappings[0]["kind"]
    return kind


def run_keys(run: Path, keys: KeyRing) -> KeyRing:
    """Return a ring that holds an encrypted run's own key and no other.

    Args:
        run: its directory.
        keys: the user's, of which one has to open it.

    Raises:
        EncryptionError: none does, or the key's file is gone or damaged.
    """
    path = run / RUN_KEY
    if not path.is_file():
        raise EncryptionError(
            f"{run} is encrypted, and {path} is gone, which holds its key: without it nobody can"
            " read the run. Restore it from a backup."
        )
    with io.BufferedReader(PlainBytes(keys.open(path))) as plain:
        key = key_of_text(plain.read().decode("ascii", "replace"))
    if key is None:
        raise EncryptionError(f"{path} opens, but holds no key of a run. Restore it from a backup.")
    return KeyRing((key,))
