"""`pkcs11:` URIs (RFC 7512): a key on a token, the library that reaches it, its PIN's file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, unquote_to_bytes

from mst.errors import UsageError

_SCHEME = "pkcs11:"
# Finds every token that the machine's own settings name (p11-kit).
_ANY_MODULE = "p11-kit-proxy.so"
_NAMES = {"token", "serial", "object", "id", "type", "module-path", "pin-source"}
_NAME = re.compile(r"[A-Za-z][A-Za-z-]{0,30}", re.ASCII)
_PRINTABLE = re.compile(r"pkcs11:[A-Za-z0-9%=;._~-]{1,500}", re.ASCII)


@dataclass(frozen=True)
class TokenUri:
    """A key on a token. The token or its serial number is named, and the key's label or id.

    Attributes:
        token: label.
        serial: number of the token.
        label: of the key.
        id: of the key.
        module: library that is loaded.
        pin_source: file that holds the PIN; None when it is asked for.
    """

    token: str | None
    serial: str | None
    label: str | None
    id: bytes | None
    module: str
    pin_source: Path | None


def parse_token_uri(text: str) -> TokenUri:
    """Return what a URI says.

    Raises:
        UsageError: it is none, holds a PIN, or does not name one key of one token. Its values
            are not quoted.
    """
    if not text.startswith(_SCHEME):
        raise UsageError(
            "--pkcs11 takes a URI such as 'pkcs11:token=LABEL;object=KEY', and what was given does"
            " not begin with pkcs11:. `p11tool --list-tokens` shows what is there."
        )
    path, _, query = text.removeprefix(_SCHEME).partition("?")
    found: dict[str, str] = {}
    for part in filter(None, [*path.split(";"), *query.split("&")]):
        name, sign, value = part.partition("=")
        if name == "pin-value":
            raise UsageError(
                "--pkcs11 has the PIN in pin-value, where other users see it. Take it out, and"
                " change the PIN; pin-source=file:PATH names a file of yours that holds it."
            )
        if name not in _NAMES or name in found:
            # What stands there without a sign, or is no name, may be the PIN.
            shown = repr(name) if sign and _NAME.fullmatch(name) else "something else"
            raise UsageError(
                f"--pkcs11 takes {', '.join(sorted(_NAMES))}, each once; found {shown}."
            )
        found[name] = value
    one_token = found.keys() & {"token", "serial"}
    one_key = found.keys() & {"object", "id"}
    if not (one_token and one_key) or found.get("type", "secret-key") != "secret-key":
        raise UsageError(
            "--pkcs11 must name one secret key of one token: token= or serial=, and object= or id=,"
            f" with type=secret-key or none; found {', '.join(sorted(found)) or 'nothing'}."
        )
    words = {name: unquote(value) for name, value in found.items()}
    return TokenUri(
        token=words.get("token"),
        serial=words.get("serial"),
        label=words.get("object"),
        id=unquote_to_bytes(found["id"]) if "id" in found else None,
        module=words.get("module-path", _ANY_MODULE),
        pin_source=_file(words["pin-source"]) if "pin-source" in words else None,
    )


def _file(source: str) -> Path:
    path = source.removeprefix("file:").removeprefix("//")
    if not path.startswith("/"):
        raise UsageError(
            "--pkcs11 takes a pin-source of the form file:/PATH, with the whole path of a file of"
            " yours that holds the PIN."
        )
    return Path(path)


def uri_of(token: str, label: str, id: bytes) -> str:
    """Return the URI of a key, without what concerns this machine alone."""
    named = [f"token={quote(token, safe='')}"]
    named += [f"object={quote(label, safe='')}"] * bool(label)
    named += ["id=" + "".join(f"%{each:02x}" for each in id)] * bool(id)
    return _SCHEME + ";".join(named)


def is_printable(uri: object) -> bool:
    """Return whether a URI that a stranger may have written can be shown."""
    return isinstance(uri, str) and _PRINTABLE.fullmatch(uri) is not None
