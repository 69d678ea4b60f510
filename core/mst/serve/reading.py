"""Texts that are read and not gone on with: their embeddings, or their tokens' log-probabilities.

They are read in pieces between the steps of the running answers, so that a long one neither holds
those up nor takes more memory than a prompt's piece does.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.serve.engine import Token

if TYPE_CHECKING:
    import torch

    from mst.serve.decoders import Served

# Positions whose probabilities over the vocabulary are had at once, in float32.
_ROWS = 32


@dataclass(eq=False)
class Text:
    """A text that is being read. Its repr shows no token.

    Attributes:
        ids: its tokens; at least one.
        top: how many of the likeliest tokens are told at each place; None for the text's vector.
        adapter: that it is read with.
        vector: takes the mean of the last hidden states.
        tokens: takes what `mst.serve.engine.Scoring.score` returns of it.
        done: tokens that were read.
    """

    ids: list[int] = field(repr=False)
    top: int | None = None
    adapter: str | None = None
    vector: Future[list[float]] = field(default_factory=Future, repr=False)
    tokens: Future[list[Token]] = field(default_factory=Future, repr=False)
    done: int = 0
    _cache: Any = field(default=None, repr=False)
    _sum: Any = field(default=0, repr=False)
    _scored: list[Token] = field(default_factory=list, repr=False)

    def fail(self, error: Exception) -> None:
        """Tell who waits that it can't be read."""
        for each in (self.vector, self.tokens):
            each.set_exception(error)


def read_on(served: Served, text: Text, columns: int | None) -> bool:
    """Read the next piece of a text, and return whether that was the last; then it is told.

    Args:
        served: the model.
        text: which.
        columns: most tokens of a piece; None for a model that can't go on from a piece.
    """
    left = len(text.ids) - text.done
    count = left if columns is None else min(columns, left)
    piece = text.ids[text.done : text.done + count]
    whole = count == len(text.ids)
    if text.top is None:
        found = _pass(served, text, piece, whole)
        text._sum = text._sum + found.sum(0)
    else:
        if not text.done:
            text._scored.append(Token(text.ids[0]))
        _score(text, _pass(served, text, piece, whole))
    text.done += count
    if text.done < len(text.ids):
        return False
    text._cache = None
    if text.top is None:
        text.vector.set_result((text._sum / len(text.ids)).tolist())
    else:
        text.tokens.set_result(text._scored)
    return True


def _pass(served: Served, text: Text, piece: list[int], whole: bool) -> torch.Tensor:
    """Return the piece's hidden states in float32, or its logits (tokens, size)."""
    arguments: dict[str, Any] = {"use_cache": False}
    if not whole:
        from mst.serve.decoders import columns_beside
        from mst.serve.slots import Slots
        from mst.training.adapters import under_adapters

        if text._cache is None:
            text._cache = Slots(under_adapters(served.model))
            text._cache.add_empty(1)
        arguments = columns_beside(text._cache, len(piece), [len(piece)], served.device)
    if text.top is None:
        found = served.hidden_states(piece, **arguments).float()
    else:
        found = served.all_logits(piece, text.adapter, **arguments)
    if not whole:
        text._cache.commit([len(piece)])
    return found


def _score(text: Text, logits: torch.Tensor) -> None:
    """Take the log-probabilities of the tokens after each of a piece's; the text's end has none."""
    import torch

    following = text.ids[text.done + 1 : text.done + 1 + len(logits)]
    for at in range(0, len(following), _ROWS):
        ids = following[at : at + _ROWS]
        found = logits[at : at + len(ids)].float().log_softmax(-1)
        own = found.gather(1, torch.tensor(ids, device=found.device)[:, None])[:, 0].tolist()
        values, names = (each.tolist() for each in found.topk(min(text.top or 0, found.shape[-1])))
        text._scored += [
            Token(token, logprob, tuple(zip(likeliest, theirs, strict=True)))
            for token, logprob, likeliest, theirs in zip(ids, own, names, values, strict=True)
        ]
