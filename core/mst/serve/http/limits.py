"""How much, how long and how many: what a caller may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: of a request.
        header_seconds: until a request's head is whole.
        body_seconds: until its body is.
        send_seconds: that a caller may take to read what was sent before more can be.
        keep_alive_seconds: that an idle connection stays open.
        requests: that are answered or wait at once.
        most_tokens: longest answer.
        grace_seconds: that answers may go on once the server has been told to end.
    """

    body_bytes: int = 4 << 20
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    keep_alive_seconds: float = 15.0
    requests: int = 64
    most_tokens: int = 1024
    grace_seconds: float = 30.0
