"""Which engine a server's worker starts, decided before anything is started."""

from __future__ import annotations

from dataclasses import dataclass

from mst.serve.engines import EngineStart


@dataclass(frozen=True)
class ExternalJob:
    """Which engine a worker starts, and with what.

    Attributes:
        name: of the engine's plugin.
        version: of the engine.
        start: without the place to listen on, which the worker makes.
        listens: as in `mst.serve.engines.EngineFacts`.
        features: as there.
    """

    name: str
    version: str
    start: EngineStart
    listens: tuple[str, ...]
    features: tuple[str, ...]
