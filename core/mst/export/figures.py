"""How far a model is from another, measured on the same rows: the figures of the gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mst.data.encode import Example

if TYPE_CHECKING:
    import torch

# Both models' logits of so many tokens are held at once: 512 of SmolLM2's are 100 MB in float32.
TOKENS_AT_ONCE = 512


@dataclass(frozen=True)
class Distance:
    """How far a model is from the one that was trained.

    Attributes:
        tokens: that were predicted.
        perplexity: on them.
        perplexity_ratio: over the trained model's.
        mean_kl: mean divergence of the next token's distribution from the trained model's, in nats.
        agreement: share of positions with the same likeliest token.
        max_logit_difference: the largest of any logit.
    """

    tokens: int
    perplexity: float
    perplexity_ratio: float
    mean_kl: float
    agreement: float
    max_logit_difference: float


def distance(
    trained: torch.nn.Module, candidate: torch.nn.Module, rows: Sequence[Example]
) -> Distance:
    """Return how far `candidate` is from `trained` on all tokens of the rows.

    A model that answers NaN is infinitely far.

    Args:
        trained: causal language model, in evaluation mode.
        candidate: another, of the same vocabulary.
        rows: encoded; every token after a row's first is predicted.
    """
    import torch

    tokens = agreeing = 0
    sums = {"trained": 0.0, "candidate": 0.0, "kl": 0.0}
    largest = 0.0
    for ids, mask in _batches(rows):
        with torch.inference_mode():
            these = _logits(trained, ids, mask)
            those = _logits(candidate, ids, mask)
        kept = mask[:, 1:].bool()
        targets = ids[:, 1:][kept]
        these, those = these[:, :-1][kept], those[:, :-1][kept]
        tokens += len(targets)
        largest = max(largest, float((these - those).abs().max()))
        agreeing += int((these.argmax(-1) == those.argmax(-1)).sum())
        expected, found = these.log_softmax(-1), those.log_softmax(-1)
        sums["trained"] -= float(expected.gather(1, targets[:, None]).double().sum())
        sums["candidate"] -= float(found.gather(1, targets[:, None]).double().sum())
        sums["kl"] += float((expected.exp() * (expected - found)).double().sum())
    loss, own = sums["candidate"] / tokens, sums["trained"] / tokens
    if not math.isfinite(loss + sums["kl"]):
        return Distance(tokens, math.inf, math.inf, math.inf, agreeing / tokens, math.inf)
    return Distance(
        tokens=tokens,
        perplexity=_exp(loss),
        perplexity_ratio=_exp(loss - own),
        mean_kl=max(0.0, sums["kl"] / tokens),
        agreement=agreeing / tokens,
        max_logit_difference=largest,
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _batches(rows: Sequence[Example]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, mask), each (rows, width), of rows of like lengths; one token says nothing."""
    import torch

    by_length = sorted(
        (each for each in rows if len(each.input_ids) > 1), key=lambda each: len(each.input_ids)
    )
    while by_length:
        width = len(by_length[-1].input_ids)
        count = max(1, TOKENS_AT_ONCE // width)
        batch, by_length = by_length[-count:], by_length[:-count]
        gaps = [width - len(each.input_ids) for each in batch]
        pairs = list(zip(batch, gaps, strict=True))
        ids = torch.tensor([[*each.input_ids, *[0] * gap] for each, gap in pairs])
        mask = torch.tensor([[*[1] * len(each.input_ids), *[0] * gap] for each, gap in pairs])
        yield ids, mask


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found.float()
