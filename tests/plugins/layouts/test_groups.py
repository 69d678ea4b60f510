"""The group size that fits every layer, and what a user is told of the others."""

from __future__ import annotations

import pytest
from tests.reference_models import LLAMA_3_8B, SMOLLM2_135M

from mst.errors import PlanError
from mst.model.facts import LinearShape
from mst_plugins.layouts.groups import choose_group_size


def test_smollm2_s_width_of_576_gets_64_and_says_why() -> None:
    chosen = choose_group_size(SMOLLM2_135M.linears)

    assert chosen.group_size == 64
    assert chosen.forbidden == {128: {576: "model.layers.0.self_attn.q_proj"}}


def test_llama_3_gets_128() -> None:
    chosen = choose_group_size(LLAMA_3_8B.linears)

    assert (chosen.group_size, chosen.forbidden) == (128, {})


def test_a_group_size_that_was_asked_for_and_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"128 does not divide 576 \(model.layers.0.self_attn"):
        choose_group_size(SMOLLM2_135M.linears, (128,))


def test_outputs_that_words_cannot_hold_are_refused() -> None:
    with pytest.raises(PlanError, match="gate has 12 outputs"):
        choose_group_size([LinearShape("gate", 12, 128)])
