"""Figures of a server, as Prometheus reads them (exposition format 0.0.4)."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from mst.serve.engine import EngineFigures
from mst.serve.http.wire import Exchange

KIND = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# What the engine counts upwards; its other figures come and go.
_COUNTED = frozenset(
    {"steps", "prompt_tokens", "cached_tokens", "generated_tokens", "finished", "cancelled",
     "failed", "restarts"}
)  # fmt: skip


class Histogram:
    """Seconds, by upper bounds."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        at = next((i for i, bound in enumerate(_BOUNDS) if seconds <= bound), len(_BOUNDS))
        self._counts[at] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Yield its lines."""
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What was answered since the start. No label holds anything that a caller made up."""

    def __init__(self) -> None:
        """Begin to count."""
        self._began = time.time()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._seconds = Histogram()
        self._first = Histogram()
        self.gone = 0

    def add(self, exchange: Exchange) -> None:
        """Count an answered request."""
        self._requests[exchange.verb, exchange.route, exchange.status] += 1
        self._tokens["prompt"] += exchange.prompt_tokens
        self._tokens["cached"] += exchange.cached_tokens
        self._tokens["completion"] += exchange.completion_tokens
        if exchange.method == "POST":
            self._seconds.add(time.monotonic() - exchange.began)
        if exchange.first_token_seconds is not None:
            self._first.add(exchange.first_token_seconds)

    def totals(self) -> Mapping[str, int]:
        """Return requests and tokens, for the audit log."""
        found = {"requests": sum(self._requests.values())}
        return found | {f"{name}_tokens": self._tokens[name] for name in ("prompt", "completion")}

    def text(self, engine: EngineFigures, in_flight: int) -> str:
        """Return all figures."""
        return "\n".join(self._lines(engine, in_flight)) + "\n"

    def _lines(self, engine: EngineFigures, in_flight: int) -> Iterator[str]:
        yield "# TYPE mst_start_time_seconds gauge"
        yield f"mst_start_time_seconds {self._began:.3f}"
        yield "# TYPE mst_requests_total counter"
        for (method, route, status), count in sorted(self._requests.items()):
            labels = f'method="{method}",route="{route}",status="{status}"'
            yield f"mst_requests_total{{{labels}}} {count}"
        yield "# TYPE mst_tokens_total counter"
        for kind in ("prompt", "cached", "completion"):
            yield f'mst_tokens_total{{kind="{kind}"}} {self._tokens[kind]}'
        yield "# TYPE mst_callers_gone_total counter"
        yield f"mst_callers_gone_total {self.gone}"
        yield "# TYPE mst_requests_in_flight gauge"
        yield f"mst_requests_in_flight {in_flight}"
        yield from self._seconds.lines("mst_request_seconds")
        yield from self._first.lines("mst_first_token_seconds")
        for name, value in dataclasses.asdict(engine).items():
            counted = name in _COUNTED
            full = f"mst_engine_{name}_total" if counted else f"mst_engine_{name}"
            yield f"# TYPE {full} {'counter' if counted else 'gauge'}"
            yield f"{full} {value}"
