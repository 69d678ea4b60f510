"""How far a model is from another, measured on the same rows: the figures of the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.data.encode import Example
from mst.export.meanwhile import GoOn
from mst.export.passes import Pass, outputs, passes_of
from mst.training.output_head import decoder_and_head, head_form, shaped

if TYPE_CHECKING:
    import torch

# Logits of so many tokens stay in a core's cache while they are compared.
TOKENS_COMPARED = 16


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
        trained_tokens: of the tokens, those that the model is trained to predict: answers.
        trained_ratio: perplexity on these alone, over the trained model's; 1 where there are none.
        trained_kl: divergence on these alone.
    """

    tokens: int
    perplexity: float
    perplexity_ratio: float
    mean_kl: float
    agreement: float
    max_logit_difference: float
    trained_tokens: int = 0
    trained_ratio: float = 1.0
    trained_kl: float = 0.0


@dataclass(frozen=True)
class Reference:
    """The trained model on the rows that candidates are held against it on.

    Attributes:
        passes: over the rows.
        logits: the trained model's of a pass, (rows, width, vocabulary), by the pass's place.
    """

    passes: Sequence[Pass] = field(repr=False)
    logits: Callable[[int], torch.Tensor] = field(repr=False)


def reference(
    trained: torch.nn.Module, rows: Sequence[Example], go_on: GoOn = lambda: None
) -> Reference:
    """Run the trained model over the rows, once for all candidates where its head is known.

    What its decoder gives is kept, a vector a token; logits, a hundred times as large, are made of
    it each time.

    Args:
        trained: causal language model, in evaluation mode.
        rows: encoded; every token after a row's first is predicted.
        go_on: called before each pass.
    """
    import torch
    from torch.nn import functional

    device = torch.device("cpu")
    form = head_form(trained, device) if hasattr(trained, "get_output_embeddings") else None
    if form is None:
        alone = passes_of(rows)

        def asked(place: int) -> torch.Tensor:
            (found,) = outputs(trained, alone[place : place + 1], go_on)
            return _float(found)

        return Reference(alone, asked)
    decoder, head = decoder_and_head(trained)
    passes = passes_of(rows, decoder)
    hidden = [each.last_hidden_state for each in outputs(decoder, passes, go_on)]
    weight, bias = head.weight, head.bias
    return Reference(
        passes, lambda place: shaped(functional.linear(hidden[place], weight, bias), form).float()
    )


def distance(
    trained: Reference, candidate: torch.nn.Module, go_on: GoOn = lambda: None
) -> Distance:
    """Return how far `candidate` is from the trained model on all tokens of the rows.

    A model that answers NaN is infinitely far.

    Args:
        trained: from `reference`.
        candidate: causal language model of the same shape, in evaluation mode.
        go_on: called before each pass.
    """
    import torch

    everything, answers = _Sums(), _Sums()
    largest = 0.0
    answered = outputs(candidate, trained.passes, go_on)
    for place, (each, output) in enumerate(zip(trained.passes, answered, strict=True)):
        with torch.inference_mode():
            own, found = trained.logits(place), _float(output)
        rows, columns = each.mask.nonzero(as_tuple=True)
        for part in range(0, len(rows), TOKENS_COMPARED):
            row, column = (where[part : part + TOKENS_COMPARED] for where in (rows, columns))
            these, those = own[row, column], found[row, column]
            target, learnt = each.following[row, column], each.learnt[row, column]
            largest = max(largest, float((these - those).abs().max()))
            same = these.argmax(-1) == those.argmax(-1)
            expected, given = these.log_softmax(-1), those.log_softmax(-1)
            losses = [-logs.gather(1, target[:, None])[:, 0].double() for logs in (expected, given)]
            kl = (expected.exp() * (expected - given)).sum(-1).double()
            for sums, chosen in ((everything, slice(None)), (answers, learnt)):
                sums.add(each.times, *(values[chosen] for values in (*losses, kl, same)))
    count = everything.tokens
    if not math.isfinite(everything.loss + everything.kl):
        agreement = everything.agreeing / count
        return Distance(count, math.inf, math.inf, math.inf, agreement, math.inf)
    return Distance(
        tokens=count,
        perplexity=_exp(everything.loss / count),
        perplexity_ratio=everything.ratio,
        mean_kl=everything.mean_kl,
        agreement=everything.agreeing / count,
        max_logit_difference=largest,
        trained_tokens=answers.tokens,
        trained_ratio=answers.ratio,
        trained_kl=answers.mean_kl,
    )


@dataclass
class _Sums:
    """What is summed over tokens: losses of both models, divergence, and likeliest ones alike."""

    tokens: int = 0
    own_loss: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    agreeing: int = 0

    def add(
        self,
        times: int,
        own: torch.Tensor,
        found: torch.Tensor,
        kl: torch.Tensor,
        same: torch.Tensor,
    ) -> None:
        """Add some tokens, so many times; each tensor (tokens,)."""
        self.tokens += times * len(own)
        self.own_loss += times * float(own.sum())
        self.loss += times * float(found.sum())
        self.kl += times * float(kl.sum())
        self.agreeing += times * int(same.sum())

    @property
    def ratio(self) -> float:
        """Perplexity over the trained model's."""
        return _exp((self.loss - self.own_loss) / max(1, self.tokens))

    @property
    def mean_kl(self) -> float:
        """Divergence a token."""
        return max(0.0, self.kl / max(1, self.tokens))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _float(output: Any) -> torch.Tensor:
    found: torch.Tensor = output.logits
    return found.float()
