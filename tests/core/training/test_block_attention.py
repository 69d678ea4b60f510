"""Attention in blocks computes what torch's own does, and is switched off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.training.conftest import example, tiny_plan
from tests.reference_plans import MODELS, planned
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from mst import rundir
from mst.data.encode import Example
from mst.explicit import as_explicit
from mst.plan import Plan
from mst.request import TrainRequest
from mst.resume import resumed_request
from mst.training.adapters import enable_checkpointing, lora_config, prepare_model
from mst.training.attention_blocks import BLOCK, keys_met
from mst.training.block_attention import block_attention, use_block_attention
from mst.training.loss import compute_in
from mst.training.output_head import HeadForm
from mst.training.scoring import lay_out, scored

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("torchs_own_again")


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def packed(*lengths: int) -> torch.Tensor:
    """Return the mask of rows end to end, none of which sees another."""
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for length in lengths:
        mask[start : start + length, start : start + length] = causal(length)
        start += length
    return mask


def branched() -> torch.Tensor:
    """Return that of two rows that share their first 70 positions."""
    mask = causal(200)
    mask[130:, 70:130] = False
    return mask


def drawn(lines: int, heads: int, shared: int, length: int, width: int) -> list[torch.Tensor]:
    """Return queries, keys and values as a layer's products lie in memory; values are narrower."""
    torch.manual_seed(length)
    shapes = ((heads, width), (shared, width), (shared, width - 2))
    return [torch.randn(lines, length, *each).transpose(1, 2).requires_grad_() for each in shapes]


@pytest.mark.parametrize(
    ("heads", "shared", "length", "masks"),
    [
        (6, 2, 3 * BLOCK, None),
        (3, 3, BLOCK + 9, None),
        (2, 1, 5, None),
        (6, 2, 200, [branched(), packed(10, 120, 70)]),
        (4, 4, 2 * BLOCK, [packed(*[1] * 2 * BLOCK)]),
        (4, 2, 2 * BLOCK, [causal(2 * BLOCK), packed(BLOCK, BLOCK)]),
        # A long line, whose blocks are larger and laid out anew for each layer.
        (2, 1, 2100, [packed(700, 1400)]),
    ],
)
def test_results_and_gradients_are_torchs_own(
    heads: int, shared: int, length: int, masks: list[torch.Tensor] | None
) -> None:
    lines = 2 if masks is None else len(masks)
    inputs = drawn(lines, heads, shared, length, 16)
    mask = None if masks is None else torch.stack(masks)[:, None]
    slopes = torch.randn(lines, length, heads, 14)
    query, *rest = inputs
    key, value = (each.repeat_interleave(heads // shared, 1) for each in rest)
    plain = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3
    ).transpose(1, 2)
    found = block_attention(*inputs, mask, 0.3)

    assert found.is_contiguous()
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    right = torch.autograd.grad(plain, inputs, slopes)
    for one, other in zip(right, torch.autograd.grad(found, inputs, slopes), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5 * float(one.abs().max()), rtol=0)


@pytest.mark.parametrize(("row", "count"), [(35, 11), (128, 3), (70, 1), (300, 2)])
def test_plans_know_how_many_keys_blocks_meet(row: int, count: int) -> None:
    length = row * count
    mask = packed(*[row] * count)
    blocks = [mask[start : start + BLOCK] for start in range(0, length, BLOCK)]
    met = sum(len(each) * int(each.any(0).sum()) for each in blocks) / length

    assert keys_met(row, length) == pytest.approx(met)


def test_many_lines_are_computed_some_at_a_time() -> None:
    # Three of these lines have as many scores as are computed at a time.
    query, key, value = drawn(4, 8, 2, 320, 8)
    masks = torch.stack([packed(100 + 20 * n, 220 - 20 * n) for n in range(4)])[:, None]
    found = block_attention(query, key, value, masks, 0.5)
    alone = [
        block_attention(query[n : n + 1], key[n : n + 1], value[n : n + 1], masks[n : n + 1], 0.5)
        for n in range(4)
    ]

    torch.testing.assert_close(found, torch.cat(alone), atol=1e-6, rtol=0)


def test_a_mask_that_is_changed_in_place_is_looked_at_again() -> None:
    query, key, value = (each.detach() for each in drawn(1, 4, 2, 130, 16))
    mask = causal(130)[None, None].clone()
    first = block_attention(query, key, value, mask, 0.5)
    mask.copy_(packed(50, 80)[None, None])
    second = block_attention(query, key, value, mask, 0.5)

    assert torch.equal(second, block_attention(query, key, value, mask.clone(), 0.5))
    assert (second - first)[:, :50].abs().max() < 1e-5
    assert (second - first)[:, 50:].abs().max() > 1e-2


def test_torch_knows_the_operator() -> None:
    query, key, value = drawn(2, 4, 2, 70, 16)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")

    torch.library.opcheck(
        block_attention, (query, key, value, causal(70)[None, None], 0.25), test_utils=checks
    )


def test_in_bfloat16_it_is_as_near_to_float32_as_torchs_own() -> None:
    inputs = [each.detach() for each in drawn(2, 6, 2, 192, 16)]
    mask = packed(90, 102).expand(2, 1, 192, 192)

    def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (each.repeat_interleave(3, 1) for each in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    right = torchs(*inputs)
    half = [each.bfloat16() for each in inputs]
    own = (torchs(*half).float() - right).norm()

    assert (block_attention(*half, mask, 0.25).float() - right).norm() < 1.5 * own


def tiny(kind: str, **more: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    model = prepare_model(
        models.from_config(configs.for_model(kind, **SHAPE | more), attn_implementation="sdpa"),
        lora_config(TrainRequest(lora_rank=4)),
    )
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.05)
    return model


def sentences() -> list[Example]:
    """Return rows of unlike lengths, some of which begin alike."""
    start = [7 * place % 500 for place in range(30)]
    return [
        example([*start[: 30 * (n % 2)], *(n * place % 499 for place in range(1, 20 + 9 * n))], 9)
        for n in range(3, 9)
    ]


def learned(
    model: torch.nn.Module, shares: bool, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor], set[str]]:
    """Return log-probabilities, gradients, and the operators that ran."""
    model.zero_grad()
    laid = lay_out(sentences(), 0, "lines", shares=shares)
    with profile(activities=[ProfilerActivity.CPU]) as kept, compute_in(model, "cpu", dtype):
        found = scored(model, laid, HeadForm(), False).log_probs
        total: Any = found.sum()
        total.backward()
    given = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    return found.detach(), given, {each.key for each in kept.key_averages()}


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {}), ("gemma3_text", {"head_dim": 16, "sliding_window": 24}), ("gpt_neox", {})],
)
def test_a_models_gradients_are_those_of_torchs_own(
    kind: str, more: dict[str, Any], shares: bool
) -> None:
    model = tiny(kind, **more)
    enable_checkpointing(model, 1)
    values, right, before = learned(model, shares)
    use_block_attention()
    others, found, after = learned(model, shares)

    assert "mst::block_attention" not in before
    assert "mst::block_attention_backward" in after
    assert not any("scaled_dot_product" in each for each in after)
    torch.testing.assert_close(others, values, atol=1e-5, rtol=1e-5)
    for one, other in zip(right, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5 * float(one.abs().max()), rtol=0)


def test_what_it_does_not_compute_is_left_to_torch() -> None:
    use_block_attention()
    dropping = tiny("llama", attention_dropout=0.1)

    assert "mst::block_attention" not in learned(dropping, False)[2]
    # The products of autocast are in bfloat16 though its weights are not.
    assert "mst::block_attention" in learned(tiny("llama"), False, torch.bfloat16)[2]


def test_a_reference_says_what_the_model_says_that_learns() -> None:
    use_block_attention()
    model = tiny("llama")
    laid = lay_out(sentences(), 0, "lines")
    with compute_in(model, "cpu", torch.bfloat16):
        learning = scored(model, laid, HeadForm(), False).log_probs
        with torch.no_grad():
            reference = scored(model, laid, HeadForm(), False).log_probs

    assert learning.requires_grad
    assert torch.equal(learning.detach(), reference)


def test_one_token_after_many_is_left_to_torch() -> None:
    use_block_attention()
    model: Any = tiny("llama")
    with torch.no_grad():
        kept = model(input_ids=torch.arange(1, 9)[None], use_cache=True).past_key_values
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model(input_ids=torch.tensor([[9]]), past_key_values=kept)

    assert "mst::block_attention" not in {each.key for each in seen.key_averages()}


def test_a_plan_for_a_cpu_has_it_unless_it_is_switched_off() -> None:
    def plan(hardware: str = "cpu-16c-64gb", **changes: Any) -> Plan:
        return planned(MODELS[0], hardware, TrainRequest(**changes))

    found, off = plan(), plan(block_attention="off")

    assert found.block_attention
    assert not off.block_attention
    assert as_explicit(TrainRequest(), found).block_attention == "auto"
    assert as_explicit(TrainRequest(), off).block_attention == "off"
    assert not plan(attn_implementation="eager").block_attention
    assert not plan("a100-40gb").block_attention


def test_a_run_of_before_goes_on_with_torchs_own(tiny_model: Path, tmp_path: Path) -> None:
    request = TrainRequest(output_dir=str(tmp_path), max_length=64)
    asked = replace(request, resume="last"), frozenset({"resume", "output_dir"})
    rundir.write_document(tmp_path, rundir.REQUEST, request)
    rundir.write_document(tmp_path, rundir.PLAN, tiny_plan(tiny_model, block_attention=True))

    assert resumed_request(*asked)[1].block_attention == "auto"
    for name in (rundir.REQUEST, rundir.PLAN):
        stored = json.loads((tmp_path / name).read_text())
        del stored["block_attention"]
        (tmp_path / name).write_text(json.dumps(stored))

    assert resumed_request(*asked)[1].block_attention == "off"
