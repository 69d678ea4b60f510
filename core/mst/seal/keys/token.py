"""AES keys that never leave a PKCS#11 token: a smart card, a hardware security module, SoftHSM."""

from __future__ import annotations

import contextlib
import getpass
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mst.errors import EncryptionError
from mst.seal.keys.key_file import read_secret
from mst.seal.keys.passphrase import has_terminal
from mst.seal.keys.token_uri import TokenUri, parse_token_uri, uri_of

_MAX_PIN_BYTES = 256
_NONCE_BYTES, _TAG_BITS = 12, 128


@dataclass(frozen=True)
class TokenKey:
    """A key on a token, and the PIN that lets it be used."""

    uri: TokenUri
    pin: str = field(repr=False)


def token_key(text: str) -> TokenKey:
    """Return the key that a URI names, with its PIN from the file it names or from the terminal.

    Raises:
        UsageError: as `mst.seal.keys.token_uri.parse_token_uri`.
        EncryptionError: the PIN's file can't be read, or others may read it; or nobody can be
            asked.
    """
    uri = parse_token_uri(text)
    if uri.pin_source is not None:
        data = read_secret(uri.pin_source, "--pkcs11 with pin-source", _MAX_PIN_BYTES)
        return TokenKey(uri, data.split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8", "replace"))
    if not has_terminal():
        raise EncryptionError(
            "--pkcs11 needs the token's PIN, and there is no terminal to ask at. Put it into a file"
            " of yours, mode 0400, and end the URI with ?pin-source=file:/PATH."
        )
    return TokenKey(uri, getpass.getpass(f"PIN of token {uri.token or uri.serial}: "))


def make_on_token(key: TokenKey) -> str:
    """Make an AES-256 key on a token, which neither shows nor exports it; return its URI.

    Raises:
        EncryptionError: as `seal_on_token`, or the key is there already.
    """
    with _session(key, writes=True) as (pkcs11, session):
        if list(session.get_objects(_template(pkcs11, key.uri))):
            raise EncryptionError(
                f"{_named(key.uri)} has that key already, and it is left as it is. Name another"
                " object or id."
            )
        attribute = pkcs11.Attribute
        allowed = {attribute.ENCRYPT, attribute.DECRYPT}
        others = {attribute.WRAP, attribute.UNWRAP, attribute.SIGN, attribute.VERIFY}
        made = session.generate_key(
            pkcs11.KeyType.AES,
            256,
            id=key.uri.id or secrets.token_bytes(8),
            label=key.uri.label or "",
            store=True,
            template={
                attribute.SENSITIVE: True,
                attribute.EXTRACTABLE: False,
                **dict.fromkeys(allowed, True),
                **dict.fromkeys(others, False),
            },
        )
        return _uri_of(session, made)


def seal_on_token(key: TokenKey, plain: bytes, bound: bytes) -> tuple[str, bytes]:
    """Let a token encrypt some bytes.

    Args:
        key: on the token.
        plain: 32 bytes.
        bound: authenticated with them.

    Returns:
        The key's URI; and nonce (12 bytes), ciphertext and tag (16 bytes) of AES-GCM.

    Raises:
        EncryptionError: the library, the token or the key isn't there, or the PIN is wrong.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    with _session(key) as (pkcs11, session):
        found = _key(pkcs11, session, key.uri)
        return _uri_of(session, found), nonce + found.encrypt(plain, **_gcm(pkcs11, nonce, bound))


def open_on_token(key: TokenKey, sealed: bytes, bound: bytes) -> bytes | None:
    """Return what `seal_on_token` was given; None when this key didn't seal it.

    Raises:
        EncryptionError: as `seal_on_token`.
    """
    nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    with _session(key) as (pkcs11, session):
        found = _key(pkcs11, session, key.uri)
        try:
            plain: bytes = found.decrypt(rest, **_gcm(pkcs11, nonce, bound))
        # A tag that doesn't fit has no error of its own: SoftHSM says GeneralError.
        except (
            pkcs11.EncryptedDataInvalid, pkcs11.EncryptedDataLenRange, pkcs11.FunctionFailed,
            pkcs11.GeneralError,
        ):  # fmt: skip
            return None
        return plain


def _gcm(pkcs11: ModuleType, nonce: bytes, bound: bytes) -> dict[str, Any]:
    return {
        "mechanism": pkcs11.Mechanism.AES_GCM,
        "mechanism_param": pkcs11.GCMParams(nonce, bound, _TAG_BITS),
    }


@contextlib.contextmanager
def _session(key: TokenKey, writes: bool = False) -> Iterator[tuple[ModuleType, Any]]:
    """Yield the package and a session on a token, of the user who has the PIN."""
    try:
        import pkcs11
    except ImportError:
        raise EncryptionError(
            "--pkcs11 needs the python-pkcs11 package, and it is not installed. Run `python -m pip"
            " install 'mst-train[pkcs11]'`."
        ) from None
    try:
        library = pkcs11.lib(key.uri.module)
    except pkcs11.PKCS11Error:
        raise EncryptionError(
            f"--pkcs11: {key.uri.module} could not be loaded as a PKCS#11 library. Install what"
            " comes with the token, and name its library: ?module-path=/PATH/LIBRARY.so"
        ) from None
    try:
        token = _token(library, key.uri)
        with token.open(rw=writes, user_pin=key.pin) as session:
            yield pkcs11, session
        return
    except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange):
        problem = "refuses the PIN. Most tokens lock after a few wrong ones: look at it first"
    except pkcs11.PinLocked:
        problem = "is locked after too many wrong PINs. Its security officer can unlock it"
    except pkcs11.PKCS11Error as error:
        problem = (
            f"answers {type(error).__name__}. It must be able to use AES-GCM, with a key for"
            " encryption and decryption"
        )
    finally:
        # The next use may be of another token: a library lists them when it begins.
        library.finalize()
    raise EncryptionError(f"--pkcs11: {_named(key.uri)} {problem}.")


def _named(uri: TokenUri) -> str:
    return f"token {uri.token or uri.serial!r}"


def _token(library: Any, uri: TokenUri) -> Any:
    there = [each for each in library.get_tokens() if each.label or each.serial]
    found = [
        each
        for each in there
        if uri.token in (None, each.label)
        and uri.serial in (None, each.serial.decode("utf-8", "replace"))
    ]
    if len(found) != 1:
        names = ", ".join(sorted(repr(each.label) for each in there)) or "none"
        raise EncryptionError(
            f"--pkcs11 names {_named(uri)}, and {uri.module} finds {len(found)} of them; it finds"
            f" {names}. Plug it in, or name one by token= and serial=."
        )
    return found[0]


def _template(pkcs11: ModuleType, uri: TokenUri) -> dict[Any, Any]:
    wanted = {
        pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
        pkcs11.Attribute.LABEL: uri.label,
        pkcs11.Attribute.ID: uri.id,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _key(pkcs11: ModuleType, session: Any, uri: TokenUri) -> Any:
    aes = {pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.AES}
    found = list(session.get_objects(_template(pkcs11, uri) | aes))
    if len(found) != 1:
        raise EncryptionError(
            f"--pkcs11: {_named(uri)} has {len(found)} AES keys of that object and id. Make one:"
            " mst data keygen --pkcs11 URI; or name one by object= and id=."
        )
    return found[0]


def _uri_of(session: Any, key: Any) -> str:
    return uri_of(session.token.label, key.label, key.id)
