"""Answers of a running server of OpenAI's API, such as `mst serve`, that the user has named."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mst.chat import Sampling
from mst.chat_terminal import printable
from mst.data.rows import Message
from mst.errors import MstError, UsageError
from mst.loopback import is_loopback

# A model that still loads lets its callers wait, and many prompts may be before ours.
_SECONDS = 600.0
_LINE_BYTES, _BODY_BYTES, _WORDS = 1 << 20, 1 << 20, 500


class ServerError(MstError):
    """A server that was named can't be reached, refuses, or doesn't answer as OpenAI's API."""


@dataclass(frozen=True)
class Server:
    """Where a server is.

    Attributes:
        shown: as the user is told.
        host: name or address; "localhost" with `path`.
        port: of it.
        path: of a unix socket, instead.
        tls: whether it is spoken to over TLS.
        base: of the API's paths, such as "/v1".
        authority: PEM file of those whose certificates are believed; None for the system's.
    """

    shown: str
    host: str
    port: int
    path: str | None = None
    tls: bool = False
    base: str = "/v1"
    authority: str | None = None


def server_of(text: str, authority: str | None = None) -> Server:
    """Return the server that a URL or the path of a socket names.

    Args:
        text: such as "http://127.0.0.1:8000/v1", "https://wards.example", "unix:/run/mst.sock"
            or the path alone.
        authority: PEM file; None for the system's authorities.

    Raises:
        UsageError: it is none of these, or what is said would cross a network for all to read.
    """
    if text.startswith("unix:") or "://" not in text:
        path = str(Path(text.removeprefix("unix:")).expanduser())
        return Server(f"unix:{path}", "localhost", 0, path)
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        port, host, parts = None, "", urlsplit("")
    # Who stands before an @ may have a password, which would be shown with the address.
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.query:
        raise UsageError(
            "--server takes http://HOST:PORT, https://HOST:PORT or the path of a socket, as mst"
            " serve has printed it behind `at`; this is none of them."
        )
    tls = parts.scheme == "https"
    if not tls and not is_loopback(host):
        raise UsageError(
            f"--server {parts.scheme}://{host} is another machine, and what you say would cross the"
            " network for all to read. Name it with https://, and start it with --tls-cert and"
            " --tls-key."
        )
    base = parts.path.rstrip("/") or "/v1"
    found = port or (443 if tls else 80)
    shown = f"{parts.scheme}://{parts.netloc}{base}"
    return Server(shown, host, found, None, tls, base, authority)


class _OnSocket(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(self._path)


def _connection(server: Server) -> http.client.HTTPConnection:
    """Return a connection that is opened with the first request; no proxy is ever asked."""
    if server.path is not None:
        return _OnSocket(server.path)
    if not server.tls:
        return http.client.HTTPConnection(server.host, server.port, timeout=_SECONDS)
    try:
        trusted = ssl.create_default_context(cafile=server.authority)
    except (OSError, ssl.SSLError):
        raise UsageError(
            f"--server-ca {server.authority} can't be read as PEM certificates. Pass the file of"
            " the authority that has signed the server's."
        ) from None
    return http.client.HTTPSConnection(server.host, server.port, timeout=_SECONDS, context=trusted)


def _asked(
    connection: http.client.HTTPConnection, server: Server, method: str, path: str,
    body: object, key: str | None,
) -> http.client.HTTPResponse:  # fmt: skip
    """Return a server's answer, whose status is 200.

    Raises:
        ServerError: it can't be reached, or refuses.
    """
    headers = {"Accept": "application/json, text/event-stream"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    raw = None
    if body is not None:
        raw = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, server.base + path, raw, headers)
        answer = connection.getresponse()
    except ssl.SSLCertVerificationError as error:
        raise ServerError(
            f"the certificate of {server.shown} is not believed: {error.verify_message}. Pass the"
            " file of the authority that has signed it: --server-ca FILE"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(server, error) from None
    if answer.status != 200:
        raise _refused(server, answer, key)
    return answer


def _unreachable(server: Server, error: Exception) -> ServerError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    if isinstance(error, TimeoutError):
        reason = f"it has not answered within {_SECONDS:g} s"
    return ServerError(
        f"no server answers at {server.shown}: {reason}. Start one (mst serve), or name the place"
        " that it has printed behind `at`."
    )


def _refused(server: Server, answer: http.client.HTTPResponse, key: str | None) -> ServerError:
    """Return what a refusal means here."""
    words = ""
    with suppress(ValueError, TypeError, KeyError, OSError, http.client.HTTPException):
        words = str(json.loads(answer.read(_BODY_BYTES))["error"]["message"])
    words = printable(words.replace("\n", " "))[:_WORDS]
    if answer.status == 401 and key is None:
        return ServerError(
            f"{server.shown} asks for an API key. Put yours into a file of mode 0600, and pass it:"
            " --api-key-file FILE"
        )
    if answer.status == 401:
        return ServerError(
            f"{server.shown} does not know the key in --api-key-file. Ask its owner for another"
            " (mst apikeys add NAME)."
        )
    return ServerError(f"{server.shown} refuses ({answer.status}): {words or 'it gives no reason'}")


def model_names(server: Server, key: str | None) -> list[str]:
    """Return the names of the models that a server lets its caller ask.

    Raises:
        ServerError: as `Remote.answer`.
    """
    with closing(_connection(server)) as connection:
        answer = _asked(connection, server, "GET", "/models", None, key)
        try:
            found = json.loads(answer.read(_BODY_BYTES))
            return [printable(str(each["id"])) for each in found["data"]]
        except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
            raise _other_api(server) from None


def _other_api(server: Server) -> ServerError:
    return ServerError(
        f"{server.shown} does not answer as OpenAI's API does. Name the base of such an API, as mst"
        " serve prints it."
    )


def chosen_model(server: Server, key: str | None, wanted: str | None) -> str:
    """Return the name of the model that is to answer: the wanted one, or the server's first.

    Raises:
        ServerError: there is none of that name, or as `model_names`.
    """
    names = model_names(server, key)
    if wanted is None and names:
        return names[0]
    if wanted is None or wanted not in names:
        there = ", ".join(names) or "none for you"
        asked = "any model" if wanted is None else f"the model {wanted}"
        raise ServerError(f"{server.shown} does not have {asked} (found: {there}). Name one.")
    return wanted


@dataclass(frozen=True)
class Remote:
    """A model of a server, as what the terminal talks to (`mst.chat_terminal.Talks`).

    Attributes:
        server: where.
        model: its name there.
        sampling: how tokens are chosen.
        key: of the caller, where the server asks for one.
    """

    server: Server
    model: str
    sampling: Sampling
    key: str | None = field(default=None, repr=False)

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the next answer's text as it comes; who stops listening stops the server's work.

        Raises:
            ServerError: the server can't be reached, refuses, or breaks off.
        """
        sampling = self.sampling
        body = {
            "model": self.model,
            "messages": [{"role": each.role, "content": each.content} for each in messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stream": True,
        }
        with closing(_connection(self.server)) as connection:
            path = "/chat/completions"
            answer = _asked(connection, self.server, "POST", path, body, self.key)
            yield from _pieces(self.server, answer)


def _pieces(server: Server, answer: http.client.HTTPResponse) -> Iterator[str]:
    """Yield the texts of a stream of server-sent events."""
    while True:
        try:
            line = answer.readline(_LINE_BYTES)
        except (OSError, http.client.HTTPException):
            line = b""
        if not line:
            raise ServerError(f"{server.shown} broke off before the answer was whole. Ask again.")
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        yield _text_of(server, data)


def _text_of(server: Server, data: bytes) -> str:
    try:
        event: Any = json.loads(data)
        if "error" in event:
            words = printable(str(event["error"]["message"]))[:_WORDS]
            raise ServerError(f"{server.shown} could not finish the answer: {words}")
        choices = event["choices"]
        return str(choices[0]["delta"].get("content") or "") if choices else ""
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _other_api(server) from None
