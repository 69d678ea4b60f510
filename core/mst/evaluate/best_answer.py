"""Which answer of a set a model finds likeliest, without asking it for all of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Tokens = tuple[int, ...]
# Given one path of tokens a row, returns the logits after each, (rows, longest path, vocabulary);
# what stands beyond a row's own path is never looked at.
Ask = Callable[[Sequence[int], Sequence[Tokens]], "torch.Tensor"]


@dataclass(frozen=True, order=True)
class _Node:
    """Answers that begin alike, and how likely that beginning is.

    Attributes:
        cost: negative log-probability of the beginning. An answer's own is never less.
        first: place in the set of the first of them, so that ties go to the first.
        length: tokens of the beginning.
        places: of these answers in the set.
    """

    cost: float
    first: int
    length: int = field(compare=False)
    places: tuple[int, ...] = field(compare=False)


def best_answers(first: torch.Tensor, answers: Sequence[Tokens], ask: Ask) -> list[int]:
    """Return, for each row, the place of the answer with the highest log-probability.

    A best-first search over the tree of the answers (Dijkstra 1959): a beginning's probability
    bounds that of all its answers, so the first whole answer that leads is the likeliest of all.
    A tuned model is asked for two or three answers out of a hundred.

    Args:
        first: logits of the first token, (rows, vocabulary).
        answers: the set, each of at least one token.
        ask: the model, told the rows still open, ascending, and a path for each.
    """
    everything = tuple(range(len(answers)))
    logs = first.float().log_softmax(-1)
    heaps = [_children(row, answers, everything, 0, 0.0) for row in logs]
    for heap in heaps:
        heapq.heapify(heap)
    found: dict[int, int] = {}
    while True:
        leading = {row: heapq.heappop(heap) for row, heap in enumerate(heaps) if row not in found}
        found |= {row: node.first for row, node in leading.items() if _whole(node, answers)}
        leading = {row: node for row, node in leading.items() if row not in found}
        if not leading:
            return [found[row] for row in range(len(heaps))]
        for row, children in _expanded(leading, answers, ask).items():
            for each in children:
                heapq.heappush(heaps[row], each)


def _whole(node: _Node, answers: Sequence[Tokens]) -> bool:
    return len(node.places) == 1 and node.length == len(answers[node.first])


def _expanded(
    leading: Mapping[int, _Node], answers: Sequence[Tokens], ask: Ask
) -> dict[int, list[_Node]]:
    """Return what follows each row's leading node: the next token at which its answers part."""
    paths = {row: _common(node, answers) for row, node in leading.items()}
    logits = ask(list(paths), list(paths.values()))
    children = {}
    for (row, path), own in zip(paths.items(), logits, strict=True):
        node, logs = leading[row], own[: len(path)].float().log_softmax(-1)
        cost = node.cost
        for place in range(node.length, len(path)):
            cost -= float(logs[place - 1, path[place]])
        children[row] = _children(logs[-1], answers, node.places, len(path), cost)
    return children


def _common(node: _Node, answers: Sequence[Tokens]) -> Tokens:
    """Return the tokens that all of a node's answers begin with; never a whole answer's last."""
    own = [answers[place] for place in node.places]
    length = node.length
    while all(len(each) > length + 1 and each[length] == own[0][length] for each in own):
        length += 1
    return own[0][:length]


def _children(
    logs: torch.Tensor,
    answers: Sequence[Tokens],
    places: Sequence[int],
    length: int,
    cost: float,
) -> list[_Node]:
    """Return the nodes one token on.

    Args:
        logs: log-probabilities of the next token, (vocabulary,).
        answers: the set.
        places: of the answers that go on from here.
        length: tokens before.
        cost: of these.
    """
    ended = [place for place in places if len(answers[place]) == length]
    nodes = [_Node(cost, place, length, (place,)) for place in ended]
    by_token: dict[int, list[int]] = {}
    for place in places:
        if len(answers[place]) > length:
            by_token.setdefault(answers[place][length], []).append(place)
    costs = (-logs[list(by_token)]).tolist() if by_token else []
    return nodes + [
        _Node(cost + more, own[0], length + 1, tuple(own))
        for own, more in zip(by_token.values(), costs, strict=True)
    ]
