"""Which of several forecast configurations is the better: by time, and by simplicity within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mst.configuration import ZERO_STAGES, Configuration
from mst.model.facts import ModelFacts
from mst.plan import Alternative, MemoryForecast, TimeForecast

# Forecasts of time are not better than this, so a simpler plan wins within it.
TIME_TIE = 1.05
# Small products run slower than the forecast knows (SmolLM2 on two cores: 4 rows of 40 tokens were
# no faster than 16 where it promised 27 %), so the largest micro-batch wins within this.
BATCH_TIE = 1.3
# To compute a tenth of the layers twice takes 3 % longer (5 % with frozen weights): less than is
# known of other choices, so within a tenth the largest micro-batch wins.
RECOMPUTED_TIES = 10


@dataclass(frozen=True)
class Candidate:
    """One configuration, forecast.

    Attributes:
        configuration: what it is.
        devices: of each machine, how many.
        memory: of one device.
        time: None when the device's speed is unknown.
        trained: weights that it changes.
        recomputed: share of the decoder's layers whose activations are computed twice.
        why_not: "" when it can be chosen.
    """

    configuration: Configuration
    devices: int
    memory: MemoryForecast
    time: TimeForecast | None
    trained: int
    recomputed: float
    why_not: str = ""


def alternative(candidate: Candidate, model: ModelFacts) -> Alternative:
    """Return the candidate as the plan lists it."""
    return Alternative(
        configuration=candidate.configuration,
        peak_bytes=candidate.memory.peak_bytes,
        host_bytes=candidate.memory.host_bytes,
        step_seconds=candidate.time.step_seconds if candidate.time else None,
        trained_share=candidate.trained / max(1, model.parameters),
        why_not=candidate.why_not,
    )


def choose(found: list[Candidate], prefer: str | None) -> Candidate | None:
    """Return the fastest candidate that fits; among those as fast, the simplest.

    Args:
        found: from `candidates`.
        prefer: a tuner that is taken before all others when it fits.
    """
    fitting = [each for each in found if not each.why_not]
    # What the copies cost has not been measured, so they are made where nothing fits without.
    fitting = [one for one in fitting if not one.configuration.activation_offloading] or fitting
    preferred = [each for each in fitting if each.configuration.tuner == prefer]
    pool = preferred or [each for each in fitting if each.configuration.tuner != "full"] or fitting
    if not pool:
        return None
    times = [each.time.step_seconds / _rows(each) for each in pool if each.time]
    if len(times) == len(pool):
        pool = [
            each
            for each in pool
            if each.time and each.time.step_seconds / _rows(each) <= TIME_TIE * min(times)
        ]
    return min(pool, key=_complexity)


def _rows(candidate: Candidate) -> int:
    """Return the rows of an optimizer step: times are compared for the same work."""
    made = candidate.configuration
    return made.micro_batch * made.accumulation * made.world_size


def _complexity(candidate: Candidate) -> tuple[float, ...]:
    """Return a key by which simpler configurations come first."""
    made = candidate.configuration
    return (
        int(made.tuner == "full"),
        int(made.quantization != "none"),
        ("none", "optimizer", "parameters").index(made.offload),
        int(made.activation_offloading),
        ZERO_STAGES[made.strategy],
        int(made.optim != "adamw_torch"),
        math.ceil(RECOMPUTED_TIES * candidate.recomputed),
        # Where no time is known, more devices are taken to be faster.
        made.world_size if candidate.time else -made.world_size,
        -made.micro_batch,
        candidate.recomputed,
    )


def order(candidate: Candidate) -> tuple[float, ...]:
    """Return a key: those that fit by time for the same work, others by what they lack."""
    if candidate.why_not:
        return (candidate.memory.peak_bytes, *_complexity(candidate))
    seconds = candidate.time.step_seconds / _rows(candidate) if candidate.time else 0.0
    return (seconds, *_complexity(candidate))


def best(found: list[Candidate]) -> Candidate:
    """Return the fastest that fits, the first where no time is known, else the smallest."""
    fitting = [each for each in found if not each.why_not]
    if not fitting:
        return min(found, key=lambda each: each.memory.peak_bytes)
    times = {id(each): each.time.step_seconds / _rows(each) for each in fitting if each.time}
    if len(times) < len(fitting):
        return fitting[0]
    close = [each for each in fitting if times[id(each)] <= BATCH_TIE * min(times.values())]
    return min(close, key=_complexity)
