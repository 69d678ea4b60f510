"""The likeliest answer is the one that asking for all of them would find, with fewer questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from mst.evaluate.best_answer import best_answers

if TYPE_CHECKING:
    import torch

_TOKENS = 12


def _next(row: int, path: tuple[int, ...], sharp: float) -> torch.Tensor:
    """Return the logits after a path, as of a model that knows nothing but them."""
    import torch

    generator = torch.Generator().manual_seed(hash((row, path)) % (1 << 31))
    return torch.randn(_TOKENS, generator=generator) * sharp


def _all_asked(row: int, answers: Sequence[tuple[int, ...]], sharp: float) -> int:
    scores = []
    for answer in answers:
        steps = [_next(row, answer[:i], sharp).log_softmax(-1) for i in range(len(answer))]
        scores.append(sum(float(each[token]) for each, token in zip(steps, answer, strict=True)))
    return max(range(len(answers)), key=lambda place: scores[place])


def _answers(seed: int) -> list[tuple[int, ...]]:
    """Return answers of which many begin alike, and some are the beginning of others."""
    draw = random.Random(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < 40:
        stem = draw.choice([(), *found])[: draw.randrange(4)]
        found[(*stem, *(draw.randrange(_TOKENS) for _ in range(draw.randrange(1, 4))))] = None
    return list(found)


@pytest.mark.parametrize("sharp", [0.1, 1.0, 6.0])
def test_the_likeliest_answer_is_that_of_asking_for_all(sharp: float) -> None:
    import torch

    for seed in range(8):
        answers, rows, asked = _answers(seed), range(5), 0

        def ask(open_rows: Sequence[int], paths: Sequence[tuple[int, ...]]) -> torch.Tensor:
            nonlocal asked
            asked += len(open_rows)
            width = max(map(len, paths))
            found = torch.full((len(paths), width, _TOKENS), float("nan"))
            for place, (row, path) in enumerate(zip(open_rows, paths, strict=True)):
                for i in range(len(path)):
                    found[place, i] = _next(row, path[: i + 1], sharp)
            return found

        first = torch.stack([_next(row, (), sharp) for row in rows])
        found = best_answers(first, answers, ask)

        assert found == [_all_asked(row, answers, sharp) for row in rows]
        assert asked < len(rows) * len(answers) / (4 if sharp > 1 else 1)


def test_of_equal_answers_the_first_is_taken() -> None:
    import torch

    def ask(rows: Sequence[int], paths: Sequence[tuple[int, ...]]) -> torch.Tensor:
        return torch.zeros(len(rows), max(map(len, paths)), _TOKENS)

    first = torch.zeros(2, _TOKENS)

    assert best_answers(first, [(3, 4), (5, 6), (3, 4)], ask) == [0, 0]
    assert best_answers(first, [(7,)], ask) == [0, 0]
