"""Whether a bundle is whole, and signed by the owner of a key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.bundle import install
from mst.durable import sha256
from mst.errors import BundleError
from mst.seal.supply.signature import load_private_key, load_public_key


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle whose every byte is as its listing says.

    Attributes:
        files: that the listing has.
        sums_sha256: of the listing: one number that stands for the whole bundle.
        signed: a signature lies there.
        public_key_sha256: of the key that it was verified with, in SubjectPublicKeyInfo (DER); None
            when no key was given.
        created: UTC, ISO 8601.
        created_by: "mst 0.1.0".
        target: device, python, platform, arch, glibc.
        packages: how many.
        models: names.
    """

    files: int
    sums_sha256: str
    signed: bool
    public_key_sha256: str | None
    created: str
    created_by: str
    target: dict[str, str]
    packages: int
    models: tuple[str, ...]


def sign_sums(bundle: Path, private_key: Path) -> None:
    """Sign the listing of a bundle: ECDSA with SHA-256 in DER, which `openssl dgst` verifies.

    Raises:
        UsageError: the key can't be used.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    signature = load_private_key(private_key).sign(
        (bundle / install.SUMS).read_bytes(), ec.ECDSA(SHA256())
    )
    (bundle / install.SIGNATURE).write_bytes(signature)


def verify_bundle(bundle: Path, public_key: Path | None = None) -> VerifiedBundle:
    """Read every byte of a bundle, and return what it is.

    Args:
        bundle: its directory.
        public_key: PEM, of who must have signed it; None to verify hashes alone.

    Raises:
        BundleError: a file differs, is missing or too much, or the signature is not of that key.
        UsageError: no such key.
    """
    if not bundle.is_dir():
        raise BundleError(f"{bundle} is no directory. Give the directory of a bundle.")
    key = None if public_key is None else _check_signature(bundle, public_key)
    try:
        manifest: dict[str, Any] = install.check_files(str(bundle))
    except install.Refused as error:
        raise BundleError(str(error)) from None
    except OSError as error:
        raise BundleError(f"cannot read {error.filename}: {error.strerror}.") from None
    return VerifiedBundle(
        files=len(manifest["files"]) + 1,
        sums_sha256=sha256(bundle / install.SUMS),
        signed=(bundle / install.SIGNATURE).is_file(),
        public_key_sha256=key,
        created=manifest["created"],
        created_by=manifest["created_by"],
        target=manifest["target"],
        packages=len(manifest["packages"]),
        models=tuple(each["name"] for each in manifest["models"]),
    )


def _check_signature(bundle: Path, public_key: Path) -> str:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = load_public_key(public_key)
    try:
        signature = (bundle / install.SIGNATURE).read_bytes()
        key.verify(signature, (bundle / install.SUMS).read_bytes(), ec.ECDSA(SHA256()))
    except OSError as error:
        raise BundleError(
            f"cannot read {error.filename}: {error.strerror}. A bundle is signed by `mst bundle"
            " create --sign KEY`; without --public-key, its hashes alone are verified."
        ) from None
    except InvalidSignature:
        raise BundleError(install.not_signed(str(bundle), str(public_key))) from None
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
