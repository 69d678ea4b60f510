"""How far a model is from another, measured on the same rows: the figures of the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.data.encode import IGNORE, Example
from mst.export.meanwhile import GoOn
from mst.training.output_head import decoder_and_head, head_form, shaped

if TYPE_CHECKING:
    import torch

# Both models' logits of so many tokens are held at once: 512 of SmolLM2's are 100 MB in float32.
TOKENS_AT_ONCE = 512
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
        batches: token ids, what is no padding, and what the model is trained to predict, each
            (rows, width).
        logits: the trained model's of a batch, (rows, width, vocabulary), by the batch's place.
    """

    batches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(repr=False)
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
        go_on: called before each batch.
    """
    import torch
    from torch.nn import functional

    batches = tuple(_batches(rows))
    device = torch.device("cpu")
    form = head_form(trained, device) if hasattr(trained, "get_output_embeddings") else None
    if form is None:
        return Reference(batches, lambda place: _logits(trained, *batches[place][:2]))
    decoder, head = decoder_and_head(trained)
    hidden = []
    for ids, mask, _ in batches:
        go_on()
        with torch.inference_mode():
            found = decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden.append(found.last_hidden_state)
    weight, bias = head.weight, head.bias
    return Reference(
        batches, lambda place: shaped(functional.linear(hidden[place], weight, bias), form).float()
    )


def distance(
    trained: Reference, candidate: torch.nn.Module, go_on: GoOn = lambda: None
) -> Distance:
    """Return how far `candidate` is from the trained model on all tokens of the rows.

    A model that answers NaN is infinitely far.

    Args:
        trained: from `reference`.
        candidate: causal language model of the same vocabulary, in evaluation mode.
        go_on: called before each batch.
    """
    import torch

    everything, answers = _Sums(), _Sums()
    largest = 0.0
    for place, (ids, mask, labels) in enumerate(trained.batches):
        go_on()
        with torch.inference_mode():
            own, found = trained.logits(place), _logits(candidate, ids, mask)
        # Of each token but a row's first, where it stands and where its logits do.
        rows, columns = mask[:, 1:].nonzero(as_tuple=True)
        for part in range(0, len(rows), TOKENS_COMPARED):
            row, column = (each[part : part + TOKENS_COMPARED] for each in (rows, columns))
            these, those = own[row, column], found[row, column]
            target, learnt = ids[row, column + 1], labels[row, column + 1]
            largest = max(largest, float((these - those).abs().max()))
            same = these.argmax(-1) == those.argmax(-1)
            expected, given = these.log_softmax(-1), those.log_softmax(-1)
            losses = [-each.gather(1, target[:, None])[:, 0].double() for each in (expected, given)]
            kl = (expected.exp() * (expected - given)).sum(-1).double()
            for sums, chosen in ((everything, slice(None)), (answers, learnt)):
                sums.add(*(each[chosen] for each in (*losses, kl, same)))
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
        self, own: torch.Tensor, found: torch.Tensor, kl: torch.Tensor, same: torch.Tensor
    ) -> None:
        """Add some tokens, each tensor (tokens,)."""
        self.tokens += len(own)
        self.own_loss += float(own.sum())
        self.loss += float(found.sum())
        self.kl += float(kl.sum())
        self.agreeing += int(same.sum())

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


def _batches(rows: Sequence[Example]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (ids, mask, labelled), each (rows, width), of rows of like lengths.

    A row of one token says nothing.
    """
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
        learnt = torch.tensor([[*each.labels, *[IGNORE] * gap] for each, gap in pairs]) != IGNORE
        yield ids, mask, learnt


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found.float()
