"""What all rows begin with is read once, counted for each, and only where that changes nothing."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from mst.data.encode import IGNORE, Example
from mst.evaluate.reading import generated, read, read_shared, shared_length
from mst.export.figures import distance, reference
from mst.export.passes import passes_of

SHARED = [1, 320, 275, 201, 99, 7]
RESTS = [[5000, 17, 44], [6], [1200, 99, 320, 5000, 17, 44, 3], [320, 320]]


def example(ids: list[int], learnt: int = 2) -> Example:
    labels = [IGNORE] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    return Example(array("i", ids), array("i", labels), None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return loaded.eval()


def test_what_is_shared_ends_before_any_rows_last_token() -> None:
    assert shared_length([[*SHARED, *each] for each in RESTS]) == len(SHARED)
    assert shared_length([SHARED, SHARED[:4]]) == 3
    assert shared_length([[1, 2], [2, 2]]) == shared_length([SHARED]) == 0


def test_figures_are_those_of_rows_read_whole(model: Any) -> None:
    import copy

    import torch

    torch.manual_seed(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    rows = [example([*SHARED, *each]) for each in RESTS]
    # A row that begins otherwise leaves nothing to share.
    apart = distance(reference(model, rows), other)
    whole = distance(reference(model, [*rows, example([9, 9])]), other)
    alone = distance(reference(model, [example([9, 9])]), other)

    assert [each.begins for each in passes_of(rows, model.model)] == [True, False]
    assert not any(each.begins for each in passes_of([*rows, example([9, 9])], model.model))
    assert (apart.tokens, apart.trained_tokens) == (
        sum(len(SHARED + each) - 1 for each in RESTS),
        8,
    )
    assert whole.tokens == apart.tokens + alone.tokens
    assert whole.mean_kl * whole.tokens == pytest.approx(
        apart.mean_kl * apart.tokens + alone.mean_kl * alone.tokens, rel=1e-3
    )
    assert whole.agreement * whole.tokens == pytest.approx(
        apart.agreement * apart.tokens + alone.agreement * alone.tokens
    )


def test_a_model_whose_beginning_sees_what_follows_reads_rows_whole(model: Any) -> None:
    import torch

    class Looking(torch.nn.Module):
        """Adds to each token's vector the mean of all that it is given with."""

        def forward(self, **given: Any) -> Any:
            found = model.model(**given)
            found.last_hidden_state += found.last_hidden_state.mean(1, keepdim=True)
            return found

    rows = [example([*SHARED, *each]) for each in RESTS]

    assert not any(each.begins for each in passes_of(rows, Looking()))


def test_prompts_read_after_what_they_share_are_answered_as_alone(model: Any) -> None:
    import torch

    prompts = [[*SHARED, *each] for each in RESTS]
    with torch.inference_mode():
        start = read_shared(model, prompts)
        assert start is not None
        together = read(model, prompts, 0, start)
        logits, answers = together.logits, generated(model, together, (2,), 6)
        for prompt, own, answer in zip(prompts, logits, answers, strict=True):
            alone = read(model, [prompt], 0)

            assert (alone.logits[0] - own).abs().max() < 1e-4
            assert generated(model, alone, (2,), 6) == [answer]
        assert read_shared(model, prompts[:1]) is None
