"""What each key has asked for lately, and whether that is within its limits."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mst.serve.api_keys import ApiKey
from mst.serve.http.refusals import too_many

_MINUTE, _DAY = 60.0, 86400.0


@dataclass
class _Used:
    times: deque[float] = field(default_factory=deque)
    day: int = 0
    tokens: int = 0


class Quota:
    """Counts in memory: a server that starts again begins anew."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Count by this clock, in seconds since 1970, UTC."""
        self._clock = clock
        self._used: dict[str, _Used] = {}

    def ask(self, key: ApiKey) -> None:
        """Count a request.

        Raises:
            Refusal: it is one too many, with the seconds until it would not be.
        """
        now = self._clock()
        used = self._of(key, now)
        if key.requests_per_minute is not None:
            while used.times and used.times[0] <= now - _MINUTE:
                used.times.popleft()
            if len(used.times) >= key.requests_per_minute:
                wait = used.times[0] + _MINUTE - now
                raise too_many(
                    f"this key may ask {key.requests_per_minute} times a minute.", math.ceil(wait)
                )
        if key.tokens_per_day is not None and used.tokens >= key.tokens_per_day:
            wait = (used.day + 1) * _DAY - now
            raise too_many(
                f"this key has used up its {key.tokens_per_day} tokens of the day (UTC).",
                math.ceil(wait),
                "insufficient_quota",
            )
        if key.requests_per_minute is not None:
            used.times.append(now)

    def spend(self, key: ApiKey, tokens: int) -> None:
        """Count tokens of prompts and answers."""
        self._of(key, self._clock()).tokens += tokens

    def _of(self, key: ApiKey, now: float) -> _Used:
        used = self._used.setdefault(key.name, _Used())
        day = int(now // _DAY)
        if used.day != day:
            used.day, used.tokens = day, 0
        return used
