"""Signatures of model directories by OpenSSF's model signing, with a key of one's own, offline."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.durable import sha256, sync_directory, sync_file
from mst.errors import ModelError, RunError, UsageError
from mst.seal.supply.model_files import check_model_files

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

# model-signing 1.1 leaves these out of every signature (`Config.hash` in hashing.py).
_NEVER_SIGNED = (".git", ".gitattributes", ".github", ".gitignore")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True)
class ModelSignature:
    """A signature that a model was verified against before it was used.

    Attributes:
        signature_sha256: of the signature file.
        public_key_sha256: of the key in SubjectPublicKeyInfo (DER), which others can compare.
        files: that the signature covers.
    """

    signature_sha256: str
    public_key_sha256: str
    files: int


@dataclass(frozen=True)
class Verified:
    """What `verify_signature` found: the signature, and names that it doesn't cover."""

    signature: ModelSignature
    not_covered: tuple[str, ...]


def generate_key(path: Path) -> Path:
    """Write a new P-256 key, readable by its owner alone, and return its public half's path.

    Raises:
        RunError: a file is there already, or can't be written.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    public = path.with_name(path.name + ".pub")
    key = ec.generate_private_key(ec.SECP256R1())
    private_text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_text = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        for each in (path, public):
            if each.exists():
                raise RunError(f"{each} exists and is never overwritten. Pass another name.")
        _write_new(path, private_text, 0o400)
        _write_new(public, public_text, 0o444)
        sync_directory(path.absolute().parent)
    except OSError as error:
        raise RunError(f"cannot write the key {path}: {error.strerror}.") from None
    return public


def sign(directory: Path, private_key: Path, output: Path) -> Verified:
    """Sign every file of a directory, verify the signature, and return what it covers.

    Args:
        directory: of a model.
        private_key: PEM, on the curve P-256, P-384 or P-521.
        output: the signature; a file that is there is replaced when the new one is whole.

    Raises:
        MstError: the key, the directory or the output stands in the way, or model-signing is not
            installed.
    """
    _require()
    from model_signing import hashing, signing

    _check_directory(directory)
    key = load_private_key(private_key)
    target = output.absolute()
    part = target.with_name(f".{target.name}.part")
    inside = [each for each in (target, part) if each.is_relative_to(directory.absolute())]
    untyped_hashing: Any = hashing
    untyped_signing: Any = signing
    config = untyped_hashing.Config().use_file_serialization().set_allow_symlinks(True)
    # The signature can't cover itself; what it leaves out is written in it.
    config.set_ignored_paths(paths=[each.relative_to(directory.absolute()) for each in inside])
    try:
        signer = untyped_signing.Config().set_hashing_config(config)
        signer.use_elliptic_key_signer(private_key=private_key)
        with _silent():
            signer.sign(directory, part)
        sync_file(part)
        part.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror}. Pass another --output.") from None
    except ValueError as error:  # files of a kind that the library doesn't sign
        raise ModelError(f"{directory} can't be signed: {_plain(str(error))}.") from None
    finally:
        part.unlink(missing_ok=True)
    return _verified(directory, target, key.public_key())


def verify_signature(directory: Path, signature: Path, public_key: Path) -> Verified:
    """Check that a directory is what the owner of a key has signed, every byte.

    Raises:
        ModelError: it isn't, or the signature leaves out a file that a model is read from.
        UsageError: a file is missing, or no such key.
        MstError: model-signing is not installed.
    """
    _require()
    if not directory.exists():
        raise ModelError(f"{directory} does not exist.")
    if not signature.is_file():
        raise UsageError(f"the signature {signature} is no file. Check the path.")
    return _verified(directory, signature, load_public_key(public_key), public_key)


def _verified(directory: Path, signature: Path, key: Any, key_path: Path | None = None) -> Verified:
    import hashlib
    import tempfile

    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from model_signing import hashing, verifying

    if directory.is_dir():
        _check_directory(directory)
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with contextlib.ExitStack() as stack:
        if key_path is None:
            held = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "key.pub"
            held.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
            key_path = held
        untyped: Any = verifying
        config = untyped.Config().use_elliptic_key_verifier(public_key=key_path)
        if directory.is_dir() and any(each.is_symlink() for each in directory.rglob("*")):
            # A hub's cache. model-signing 1.1 forgets what its own signature says of links.
            hashes: Any = hashing
            config.set_hashing_config(hashes.Config().set_allow_symlinks(True))
        try:
            with _silent():
                config.verify(directory, signature)
        except InvalidSignature:
            raise ModelError(
                f"{signature} is not signed with this key, or was changed. Don't use the model;"
                " ask its source for the signature and the key."
            ) from None
        # The library raises ValueError for most, and whatever its parsers raise for the rest.
        except Exception as error:
            raise ModelError(
                f"{directory} is not what {signature} signs:"
                f" {_plain(str(error)) or type(error).__name__}."
                " Don't use it; copy it again from the source."
            ) from None
    covered, left_out = _covered(directory, signature)
    return Verified(
        ModelSignature(sha256(signature), hashlib.sha256(der).hexdigest(), covered), left_out
    )


def _plain(text: str) -> str:
    """Return a library's words in one line; they may quote a file's name that steers terminals."""
    return "".join(each for each in " ".join(text.split())[:300] if each.isprintable())


def _covered(directory: Path, signature: Path) -> tuple[int, tuple[str, ...]]:
    """Return how many files a verified signature covers, and the names of the others.

    Raises:
        ModelError: it leaves out a file beside git's own and itself.
    """
    import base64
    import json

    bundle = json.loads(signature.read_text(encoding="utf-8"))
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    names = {str(each["name"]) for each in payload["predicate"]["resources"]}
    if not directory.is_dir():
        return len(names), ()
    here = {
        each.relative_to(directory).as_posix(): each
        for each in directory.rglob("*")
        if each.is_file()
    }
    outside = {name: each for name, each in here.items() if name not in names}
    unknown = [
        name
        for name, each in outside.items()
        if name.split("/")[0] not in _NEVER_SIGNED and each.resolve() != signature.resolve()
    ]
    if unknown:
        raise ModelError(
            f"{signature} leaves out {len(unknown)} files of {directory}, such as"
            f" {sorted(unknown)[0]!a}. Remove them, or get a signature of the whole model."
        )
    git = {name.split("/")[0] for name in outside} & set(_NEVER_SIGNED)
    return len(names), tuple(sorted(git))


def _check_directory(directory: Path) -> None:
    if not directory.is_dir() or not any(directory.iterdir()):
        raise ModelError(f"{directory} is no directory with files. Give a model's directory.")
    check_model_files(directory)


def _require() -> None:
    if any(importlib.util.find_spec(each) is None for each in ("model_signing", "OpenSSL")):
        raise UsageError(
            "signatures of models need model-signing, which is not installed here. Install it:"
            " python -m pip install 'mst-train[sign]'. `mst models manifest` needs nothing."
        )


def _write_new(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load_private_key(path: Path) -> EllipticCurvePrivateKey:
    """Return the private key in a PEM file.

    Raises:
        UsageError: it can't be read, can be read by others, or is no key on a curve of ours.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the private key {path}: {error.strerror}.") from None
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(
            f"others than you can read the private key {path}. chmod 400 it, and think of"
            " making a new one: mst sign --generate-key FILE"
        )
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise UsageError(
            f"{path} is no private key in PEM, or has a passphrase, which mst sign does not ask"
            " for. Make one: mst sign --generate-key FILE"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise UsageError(f"{path} is no key on P-256, P-384 or P-521, as model signing takes them.")
    return key


def load_public_key(path: Path) -> EllipticCurvePublicKey:
    """Return the public key in a PEM file.

    Raises:
        UsageError: it can't be read, or is no key on a curve of ours.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the public key {path}: {error.strerror}.") from None
    except (ValueError, TypeError):
        raise UsageError(
            f"{path} is no public key in PEM. mst sign --generate-key makes one."
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise UsageError(f"{path} is no key on P-256, P-384 or P-521, as model signing takes them.")
    return key


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the library's own prints off standard output, which may be read as JSON."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
