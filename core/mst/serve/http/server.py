"""Speaking HTTP on a unix socket until told to end: uvicorn, with limits of time that it lacks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mst.errors import MstError
from mst.serve.http.limits import Limits
from mst.serve.http.relay import READY, STOP
from mst.serve.http.tls import Tls, told
from mst.serve.http.wire import Receive, Send

_HEAD_BYTES = 32 << 10


class Ending(Protocol):
    """What knows that a server has been told to end."""

    stopping: bool


class Application(Protocol):
    """An application of ASGI that can be told to end."""

    @property
    def service(self) -> Ending:
        """What it serves."""

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""


def _protocol(head_seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, which ends a connection whose request's head is too slow."""

    class Timed(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._expect()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()

        def on_response_complete(self) -> None:
            # Its own timer of idle connections takes over.
            self._forget()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _expect(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(head_seconds, self.transport.close)

        def _forget(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Timed


class _Server(uvicorn.Server):
    """uvicorn behind the relay, with signals that end it and nothing else.

    Attributes:
        lost: the relay has ended first.
    """

    def __init__(self, config: uvicorn.Config, service: Ending, control: int) -> None:
        """Take what is told that the server ends, and the pipe to the relay."""
        super().__init__(config)
        self.lost = False
        self._service = service
        self._control = control

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `run_behind_relay`: uvicorn raises them again, and returns not 0."""
        yield

    async def run_behind_relay(
        self, listener: socket.socket, handshake_seconds: float | None, began: Callable[[], None]
    ) -> None:
        """Take requests until a signal, or the relay's end, and tell the relay of both."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        # The end of a pipe that is written to has nothing to read but that nobody reads it.
        loop.add_reader(self._control, self._lose, loop)
        if handshake_seconds is not None:
            # uvicorn leaves it at asyncio's minute.
            loop.create_server = partial(  # type: ignore[method-assign]
                loop.create_server, ssl_handshake_timeout=handshake_seconds
            )
        loop.call_soon(self._begin, began)
        await self.serve(sockets=[listener])

    def _begin(self, began: Callable[[], None]) -> None:
        began()
        self._tell(READY)

    def _end(self, number: int) -> None:
        if self._service.stopping:
            # A second SIGTERM says nothing new: systemd sends one to each process of a service,
            # and those above hand theirs on.
            self.force_exit = self.force_exit or number == signal.SIGINT
            return
        self._service.stopping = True
        self._tell(STOP)
        self.should_exit = True

    def _lose(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lost = True
        loop.remove_reader(self._control)
        self._end(signal.SIGTERM)

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._control, what)


def serve(
    app: Application,
    listener: socket.socket,
    limits: Limits,
    tls: Tls | None,
    control: int,
    began: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way are finished within the grace period.

    Args:
        app: what answers.
        listener: a listening socket.
        limits: of time.
        tls: None for plain HTTP.
        control: pipe to the relay, which is told when requests are taken, and when no more are.
        began: is called just before the relay is told that they are.

    Raises:
        UsageError: the files of TLS can't be used.
        MstError: the relay has ended, so that nobody can come in any more.
    """
    # It would tell of callers' mistakes, and the application has its own log.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
    config = _config(app, limits, tls)
    with contextlib.nullcontext() if tls is None else told(tls):
        config.load()
    server = _Server(config, app.service, control)
    handshake = None if tls is None else limits.header_seconds
    asyncio.run(server.run_behind_relay(listener, handshake, began))
    if server.lost:
        raise MstError(
            "the relay, by which callers come in, has ended (somebody may have killed it). What was"
            " being answered is lost. Start the server again."
        )


def _config(app: Application, limits: Limits, tls: Tls | None) -> uvicorn.Config:
    given: dict[str, Any] = {}
    if tls is not None:
        import ssl

        given = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
        if tls.client_ca is not None:
            given |= {"ssl_ca_certs": tls.client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return uvicorn.Config(
        app,
        http=_protocol(limits.header_seconds),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=math.ceil(limits.keep_alive_seconds),
        timeout_graceful_shutdown=math.ceil(limits.grace_seconds),
        h11_max_incomplete_event_size=_HEAD_BYTES,
        **given,
    )
