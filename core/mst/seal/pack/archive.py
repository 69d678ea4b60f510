"""The archive: a zip file whose listing is signed with the audit log's key."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import AuditError
from mst.private_zip import write_new
from mst.seal.audit.key import is_signed, public_hex, public_pem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LISTING, SIGNATURE, PUBLIC = "MANIFEST.json", "MANIFEST.sig", "key.pub"
TYPE = "mst audit pack 1"
# Of one file in an archive that somebody else made: metrics of a long run take some megabytes.
_MOST_BYTES = 1 << 30
_PACKINGS = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)
# What zipfile raises where bytes are wrong; RuntimeError for a file that says it has a password.
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Checked:
    """An archive that is as it was signed.

    Attributes:
        run: the run directory that it is of.
        created: UTC, RFC 3339.
        public_key: of the key that signed it: 32 bytes in hexadecimal.
        files: how many it holds.
    """

    run: str
    created: str
    public_key: str
    files: int


def write(
    members: Mapping[str, bytes], run: Path, created: str, key: Ed25519PrivateKey, target: Path
) -> None:
    """Write an archive, whole or not at all.

    Raises:
        AuditError: something is at `target`, or it can't be written.
    """
    listing = {
        "type": TYPE,
        "run": str(run),
        "created": created,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(members.items())},
    }
    signed = json.dumps(listing, indent=2, ensure_ascii=True).encode() + b"\n"
    public = public_hex(key)
    parts = {
        **members,
        LISTING: signed,
        SIGNATURE: key.sign(signed).hex().encode() + b"\n",
        PUBLIC: public_pem(public).encode(),
    }
    try:
        write_new(parts, target)
    except OSError as error:
        raise AuditError(
            f"cannot write {target}: {error.strerror}. Choose another --output."
        ) from None


def check(path: Path, public_key: str | None = None) -> Checked:
    """Make sure that an archive is as it was signed.

    Args:
        path: the archive.
        public_key: that must have signed it, in hexadecimal; None takes the one inside, which
            shows that nothing was changed by anybody without that key, and not whose key it is.

    Raises:
        AuditError: it is no archive of ours, or not as it was signed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _checked(path, _parts(path, archive), public_key)
    except OSError as error:
        raise AuditError(f"cannot read {path}: {error.strerror}.") from None
    except _DAMAGED:
        raise _changed(path, "it is damaged, or no zip file") from None


def _parts(path: Path, archive: zipfile.ZipFile) -> dict[str, bytes]:
    infos = archive.infolist()
    if sum(each.file_size for each in infos) > _MOST_BYTES:
        raise _changed(path, "it unpacks to more than 1 GiB")
    if any(each.compress_type not in _PACKINGS for each in infos):
        raise _changed(path, "a file in it is packed in another way")
    if len({each.filename for each in infos}) != len(infos):
        raise _changed(path, "it holds two files of one name")
    return {each.filename: archive.read(each) for each in infos}


def _checked(path: Path, parts: Mapping[str, bytes], public_key: str | None) -> Checked:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    signed = parts.get(LISTING, b"")
    try:
        inside = load_pem_public_key(parts.get(PUBLIC, b""))
        signature = parts.get(SIGNATURE, b"").decode("ascii").strip()
    except ValueError:
        raise _changed(path, "its key or its signature is damaged or missing") from None
    if not isinstance(inside, Ed25519PublicKey):
        raise _changed(path, "its key is no Ed25519 key")
    found = inside.public_bytes_raw().hex()
    if public_key is not None and public_key != found:
        raise _changed(path, "it was signed with another key than the one given")
    if not is_signed(found, signature, signed):
        raise _changed(path, "its listing is not as it was signed")
    listing = json.loads(signed)
    files = dict(listing["files"])
    there = {
        name: hashlib.sha256(data).hexdigest()
        for name, data in parts.items()
        if name not in (LISTING, SIGNATURE, PUBLIC)
    }
    if listing["type"] != TYPE or there != files:
        wrong = sorted({*files, *there} - {n for n in files if files[n] == there.get(n)})
        raise _changed(path, f"{wrong[0] if wrong else 'its type'} is not as it was signed")
    return Checked(str(listing["run"]), str(listing["created"]), found, len(files))


def _changed(path: Path, why: str) -> AuditError:
    return AuditError(f"{path} is not what `mst audit pack` wrote: {why}. Ask for it again.")
