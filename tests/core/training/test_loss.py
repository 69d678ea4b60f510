"""The loss is what transformers computes row by row, however the rows are laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mst.data.encode import Example
from mst.training.batches import Layout, collate
from mst.training.isolation import rows_stay_apart
from mst.training.loss import Logits, logits_of, summed_loss
from mst.training.output_head import HeadForm

if TYPE_CHECKING:
    import torch


def by_transformers(model: torch.nn.Module, examples: list[Example]) -> float:
    """Sum of each row's loss, run alone through transformers' own labels argument."""
    import torch

    whole: Any = model
    total = 0.0
    for each in examples:
        count = sum(label != -100 for label in each.labels)
        ids, labels = torch.tensor([list(each.input_ids)]), torch.tensor([list(each.labels)])
        total += float(whole(input_ids=ids, labels=labels).loss.detach()) * count
    return total


@pytest.mark.parametrize("layout", ["padded", "line", "lines"])
@pytest.mark.parametrize("how", ["all", "kept", HeadForm()])
def test_loss_equals_rows_run_alone(
    model: torch.nn.Module, examples: list[Example], layout: Layout, how: Logits
) -> None:
    batch = collate(examples, pad_token_id=0, layout=layout)
    found = float(summed_loss(model, batch, how).detach())

    assert found == pytest.approx(by_transformers(model, examples), rel=1e-5)


def test_llama_keeps_packed_rows_apart(model: torch.nn.Module) -> None:
    import torch

    assert logits_of(model) == "kept"
    assert rows_stay_apart(model, 6400, torch.device("cpu"))


def test_a_model_that_mixes_rows_is_found_out() -> None:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    # Bloom has no position_ids: packed rows would see each other.
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2))

    assert not rows_stay_apart(bloom, 256, torch.device("cpu"))
