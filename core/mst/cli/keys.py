"""The options that name the keys of encrypted data, for all commands that read it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mst.request import fields

if TYPE_CHECKING:
    from mst.seal.keys.ring import KeyRing

_NAMES = ("key_file", "passphrase_file", "pkcs11")

_AGAIN = {"key-file": "--key-file FILE", "pkcs11": "--pkcs11 URI"}


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, which are those of `mst train`."""
    for name in _NAMES:
        meta = fields()[name].metadata
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, metavar=meta["metavar"], help=meta["help"])


def ring_given(args: argparse.Namespace) -> KeyRing:
    """Return the secrets that the options name.

    Raises:
        EncryptionError: as `mst.seal.keys.ring.ring_of`.
        UsageError: likewise.
    """
    from mst.seal.keys.ring import ring_of

    return ring_of(*(getattr(args, name) for name in _NAMES))


def options_again(keys: Iterable[str]) -> str:
    """Return the options that a next command needs to open the same data; "" for none.

    Where a key lies is kept nowhere, so a word stands for it. A passphrase is asked for, and
    systemd gives its key without an option.

    Args:
        keys: names of the keys that have opened data, as `mst.data.rows.FileFacts.key`, or their
            kinds.
    """
    needed = {option for each in keys for start, option in _AGAIN.items() if each.startswith(start)}
    return "".join(f" {each}" for each in sorted(needed))
