"""A second accountant: the privacy loss of many steps, as a distribution on a grid.

It shares no code with Opacus, whose figure it has to confirm. Needs numpy and scipy, which come
with Opacus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Masses = np.ndarray[Any, np.dtype[np.float64]]

# Distance of two losses on the grid: the error falls with its square.
GRID = 1e-3
# What a step's distribution, and each product of two, may leave out at its ends; what is left out
# above counts as a loss without bound.
TAIL = 1e-15
# Losses beyond it count as without bound: exp() of larger ones overflows.
FARTHEST = 500.0


@dataclass(frozen=True)
class LossDistribution:
    """Probabilities of the privacy loss ln(P(x)/Q(x)) under P.

    Attributes:
        first: `masses[0]` is that of the loss `first * GRID`.
        masses: of each loss on the grid.
        unbounded: that of losses beyond it.
    """

    first: int
    masses: Masses
    unbounded: float


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return an upper bound of ε of the Poisson-subsampled Gaussian mechanism.

    Neighbouring data sets differ in one unit that one of them has in addition. Both directions
    are composed, and the larger ε counts.

    Args:
        noise_multiplier: standard deviation of the noise, in units of the clipping norm.
        sample_rate: probability with which a unit takes part in a step, above 0, at most 1.
        steps: at least 1.
        delta: the chance that the bound does not hold, above 0.

    Source: Sommer et al. 2019, "Privacy Loss Classes"; the grid as in Doroshenko et al. 2022,
    "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions".
    """
    both = (_step(noise_multiplier, sample_rate, removed) for removed in (True, False))
    return max(_epsilon_of(_composed(each, steps), delta) for each in both)


def _step(sigma: float, rate: float, removed: bool) -> LossDistribution:
    """Return one step's distribution: P is the mixture where the unit is `removed`, else Q is.

    Source: Mironov, Talwar and Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian
    Mechanism", section 3: the unit moves the mean from 0 to 1 with probability `rate`.
    """
    import numpy as np
    from scipy.special import ndtr, ndtri

    # Nothing beyond these outcomes has a probability that counts.
    reach = -float(ndtri(TAIL)) * sigma
    low, high = -reach, 1 + reach

    def loss(x: float) -> float:
        exponent = (2 * x - 1) / (2 * sigma**2) + math.log(rate)
        rest = math.log1p(-rate) if rate < 1 else -math.inf
        return float(np.logaddexp(rest, exponent))

    bottom = math.floor(max(loss(low), -FARTHEST) / GRID)
    top = math.ceil(min(loss(high), FARTHEST) / GRID)
    losses = np.arange(bottom, top + 1) * GRID
    # Where the mixture's loss has these values; below ln(1 - rate) it has none.
    share = (np.exp(losses) - (1 - rate)) / rate
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(share > 0, sigma**2 * np.log(share) + 0.5, -np.inf)
    # What lies beyond the grid has a loss without bound where the loss is large, and counts as the
    # smallest on the grid where it is small.
    x[0 if removed else -1] = -np.inf if removed else np.inf

    def between(mean: float) -> Masses:
        # The tail on the nearer side keeps what is small exact.
        z = (x - mean) / sigma
        below = z[1:] <= 0
        found: Masses = np.where(below, ndtr(z[1:]) - ndtr(z[:-1]), ndtr(-z[:-1]) - ndtr(-z[1:]))
        return found

    plain = between(0.0)
    mixture = (1 - rate) * plain + rate * between(1.0)
    if removed:
        return _on_grid(bottom, mixture, plain)
    return _on_grid(-top, plain[::-1], mixture[::-1])


def _on_grid(first: int, p: Masses, q: Masses) -> LossDistribution:
    """Move the mass between two losses to both ends so that it stays the same under P and Q.

    What comes of it dominates the distribution itself.
    """
    import numpy as np

    lower = (first + np.arange(len(p))) * GRID
    # p = a + b and q = a exp(-lower) + b exp(-lower - GRID), solved for b.
    above = (p - q * np.exp(lower)) / -math.expm1(-GRID)
    above = np.clip(above, 0.0, p)
    masses = np.zeros(len(p) + 1)
    masses[:-1] += p - above
    masses[1:] += above
    return LossDistribution(first, masses, max(0.0, 1.0 - float(masses.sum())))


def _composed(one: LossDistribution, times: int) -> LossDistribution:
    """Return the distribution of the sum of so many independent losses."""
    total: LossDistribution | None = None
    square = one
    while True:
        if times % 2:
            total = square if total is None else _product(total, square)
        times //= 2
        if not times:
            assert total is not None
            return total
        square = _product(square, square)


def _product(these: LossDistribution, those: LossDistribution) -> LossDistribution:
    import numpy as np
    from scipy.signal import fftconvolve

    masses = np.clip(fftconvolve(these.masses, those.masses), 0.0, None)
    unbounded = 1.0 - (1.0 - these.unbounded) * (1.0 - those.unbounded)
    first = these.first + those.first
    upper = np.cumsum(masses[::-1])[::-1]
    # From the end on all is negligible, or as good as without bound.
    end = min(int(np.searchsorted(-upper, -TAIL)), math.ceil(FARTHEST / GRID) - first)
    end = min(max(1, end), len(masses))
    unbounded += float(upper[end]) if end < len(upper) else 0.0
    start = int(np.searchsorted(np.cumsum(masses[:end]), TAIL))
    start = min(max(start, math.floor(-FARTHEST / GRID) - first), end - 1)
    # A small loss counts for no less when it is taken for a larger one.
    kept = masses[start:end].copy()
    kept[0] += float(masses[:start].sum())
    return LossDistribution(first + start, kept, unbounded)


def _epsilon_of(found: LossDistribution, delta: float) -> float:
    """Return the smallest ε at which the distribution's δ is at most `delta`.

    δ(ε) is the sum over losses l > ε of their mass times 1 - exp(ε - l).
    """
    import numpy as np

    losses = (found.first + np.arange(len(found.masses))) * GRID
    far = losses > FARTHEST
    unbounded = found.unbounded + float(found.masses[far].sum())
    if unbounded > delta:
        return math.inf
    # ε is not negative, so only losses from 0 on matter.
    counted = (losses >= 0) & ~far
    masses, losses = found.masses[counted], losses[counted]
    # Between two losses δ(ε) = A - exp(ε) B, with A and B summed over the losses above.
    a = np.cumsum(masses[::-1])[::-1] + unbounded
    b = np.cumsum((masses * np.exp(-losses))[::-1])[::-1]
    kept = a - np.exp(losses) * b <= delta
    if not kept.any() or kept[0]:
        return 0.0
    place = int(np.argmax(kept))
    return max(0.0, math.log((float(a[place]) - delta) / float(b[place])))
