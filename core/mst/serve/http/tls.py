"""The files of TLS, and whether they can be used: asked before a model is loaded, and inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mst.errors import UsageError


@dataclass(frozen=True)
class Tls:
    """Files of TLS.

    Attributes:
        certificate: of the server, with its chain, PEM.
        key: private, PEM.
        client_ca: whose clients alone may connect; None for any.
    """

    certificate: str
    key: str
    client_ca: str | None = None


class _Locked(Exception):
    """A key asks for a passphrase."""


def check(tls: Tls) -> None:
    """Find out whether a server can be had with these files.

    Raises:
        UsageError: one is missing, can't be read, or they don't belong together.
    """
    import ssl

    def locked() -> str:
        # Else OpenSSL asks for it at the terminal, and a service waits without end.
        raise _Locked

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with told(tls):
        context.load_cert_chain(tls.certificate, tls.key, password=locked)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)


@contextmanager
def told(tls: Tls) -> Iterator[None]:
    """Turn what goes wrong with these files in the block into a UsageError."""
    import ssl

    try:
        yield
    except _Locked:
        why = f"{tls.key} has a passphrase"
    except ssl.SSLError:
        why = "they are no certificate and its key"
    except OSError as error:
        files = [each for each in (tls.certificate, tls.key, tls.client_ca) if each]
        missing = [each for each in files if not Path(each).is_file()]
        why = f"{missing[0]} is not there" if missing else f"one can't be read ({error.strerror})"
    else:
        return
    given = ", ".join(each for each in (tls.certificate, tls.key, tls.client_ca) if each)
    raise UsageError(
        f"TLS can't be had with {given}: {why}. Pass PEM files that belong together to --tls-cert"
        " and --tls-key, the key without a passphrase."
    )
