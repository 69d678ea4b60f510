"""Rows that share their beginnings give the losses and the gradients that each gives alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.core.training.conftest import example, pair, tiny_plan

from mst import rundir
from mst.data.encode import Example
from mst.plan import Plan
from mst.request import TrainRequest
from mst.resume import resumed_request
from mst.training import checkpoint, loop
from mst.training.adapters import (
    enable_checkpointing,
    lora_config,
    prepare_model,
    trained_parameters,
)
from mst.training.batches import Layout
from mst.training.block_attention import use_block_attention
from mst.training.checkpoint import TrainState
from mst.training.compilation import compile_layers
from mst.training.isolation import prefixes_can_be_shared, sharing_obstacle
from mst.training.loop import run
from mst.training.loss import Logits, logits_of
from mst.training.output_head import HeadForm
from mst.training.prefixes import beginnings
from mst.training.scoring import lay_out, scored
from mst.training.shared_lines import line_tokens, shared_lines
from mst.training.tensor_kind import TensorKind
from mst.workload import DataFacts, spared_share

if TYPE_CHECKING:
    import torch

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 256},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "gpt_neox": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
}


def made(kind: str, **more: Any) -> torch.nn.Module:
    """Return a tiny model with random weights, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | KINDS.get(kind, {}) | more)
    untyped: Any = AutoModelForCausalLM
    model: torch.nn.Module = untyped.from_config(
        config, attn_implementation=None if kind == "mamba" else "sdpa"
    )
    return model


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with adapters that do something."""
    import torch

    model = prepare_model(model, lora_config(TrainRequest(lora_rank=4)))
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.05)
    return model


def few_shot_rows() -> list[Example]:
    """Rows under one system prompt, some of which have examples too, and one of another kind."""
    draw = random.Random(3)

    def ids(length: int) -> list[int]:
        return [draw.randrange(4, 500) for _ in range(length)]

    system, shots = ids(37), ids(22)
    prompts = [[*system], [*system, *shots], [], [*system, *shots], [*system]]
    rows = [
        example([*prompt, *ids(length)], answer)
        for prompt, length, answer in zip(
            prompts, (9, 30, 14, 3, 21), (4, 29, 5, 2, 6), strict=True
        )
    ]
    # In this one the system prompt itself carries loss.
    return [*rows, example([*system, *ids(5)], 41)]


def log_probs_and_gradients(
    model: torch.nn.Module,
    parts: list[list[Example]],
    layout: Layout,
    shares: bool,
    how: Logits,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return each row's log-probability over all parts, and the gradients of a sum of them."""
    import torch

    model.zero_grad()
    found, place = [], 0
    for rows in parts:
        laid = lay_out(rows, 0, layout, shares=shares)
        assert (laid.batch.labels is not None) == shares
        sums = scored(model, laid, how, False).log_probs.sum(-1)
        # Each row counts for something else, as preferences and advantages have it.
        factors = torch.arange(place + 1, place + 1 + len(rows)) % 3 - 0.5
        whole: Any = (sums * factors).sum()
        whole.backward()
        place += len(rows)
        found.append(sums.detach())
    gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    return torch.cat(found), gradients


def assert_alike(model: torch.nn.Module, rows: list[Example], layout: Layout, how: Logits) -> None:
    import torch

    alone = log_probs_and_gradients(model, [[each] for each in rows], "padded", False, how)
    shared = log_probs_and_gradients(model, [rows], layout, True, how)

    torch.testing.assert_close(shared[0], alone[0], atol=1e-5, rtol=1e-5)
    assert len(shared[1]) == len(alone[1])
    for one, other in zip(shared[1], alone[1], strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one / scale, other / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_rows_run_alone(kind: str) -> None:
    import torch

    model = made(kind)

    assert sharing_obstacle(model, 500, torch.device("cpu"), torch.float32, 100) == ""
    assert_alike(model, few_shot_rows(), "lines", logits_of(model))


@pytest.mark.parametrize("layout", ["lines", "single"])
@pytest.mark.parametrize("how", ["all", "kept", HeadForm()])
@pytest.mark.parametrize("adapters", [True, False])
def test_so_are_they_however_logits_are_had(layout: Layout, how: Logits, adapters: bool) -> None:
    model = made("llama")
    if adapters:
        model = adapted(model)

    assert_alike(model, few_shot_rows(), layout, how)


@pytest.mark.parametrize(("adapters", "layers"), [(True, None), (False, None), (True, 1)])
def test_so_are_they_with_recomputed_activations(adapters: bool, layers: int | None) -> None:
    model = made("qwen3")
    if adapters:
        model = adapted(model)
    enable_checkpointing(model, layers)

    assert_alike(model.train(), few_shot_rows(), "alike", HeadForm())


def test_in_bfloat16_the_model_is_asked_too() -> None:
    import torch

    model = made("llama").to(torch.bfloat16)

    assert prefixes_can_be_shared(model, 500, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("gemma3_text", {"sliding_window": 64}, "some of its layers see 64 tokens back"),
        ("mistral", {"sliding_window": 99}, "some of its layers see 99 tokens back"),
        ("llama", {"attention_dropout": 0.1}, "dropout would be drawn once"),
        ("gpt2", {}, "dropout would be drawn once"),
        ("mixtral", {"router_jitter_noise": 0.1}, "its experts are chosen by"),
        ("mixtral", {"output_router_logits": True}, "its experts are chosen by"),
        ("mamba", {}, "it does not compute the same"),
    ],
)
def test_models_that_would_compute_something_else_are_refused(
    kind: str, more: dict[str, Any], reason: str
) -> None:
    import torch

    found = sharing_obstacle(made(kind, **more), 500, torch.device("cpu"), torch.float32, 100)

    assert found.startswith(reason)


def test_dropout_of_adapters_is_refused_and_a_window_of_all_rows_is_not() -> None:
    import torch

    def obstacle(model: torch.nn.Module) -> str:
        return sharing_obstacle(model, 500, torch.device("cpu"), torch.float32, 100)

    dropping = prepare_model(made("llama"), lora_config(TrainRequest(lora_dropout=0.1)))

    assert obstacle(dropping).startswith("dropout")
    assert obstacle(made("mistral", sliding_window=100)) == ""


def test_a_model_that_lets_rows_meet_is_found_out() -> None:
    """Positions that count along the line (ALiBi), and attention that takes no such mask."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

    configs: Any = BloomConfig
    models: Any = BloomForCausalLM
    torch.manual_seed(0)
    bloom = models(configs(vocab_size=512, hidden_size=64, n_layer=2, n_head=4))

    assert not prefixes_can_be_shared(bloom, 500, torch.device("cpu"), torch.float32)

    shape: Any = LlamaConfig
    forgetful: Any = LlamaForCausalLM(shape(**SMALL))
    whole = forgetful.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        """Drop the mask, as code that knows of two dimensions alone may."""
        if kwargs["attention_mask"] is not None and kwargs["attention_mask"].dim() == 4:
            kwargs["attention_mask"] = None
        return whole(*args, **kwargs)

    forgetful.model.forward = forward

    assert not prefixes_can_be_shared(forgetful, 500, torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_compiled_layers_take_one_shared_line_as_any_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchs_own_again: None
) -> None:
    import torch
    from torch._dynamo import config as dynamo

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # the compiler is told anew, and nobody after
    model = made("llama", num_hidden_layers=1)
    rows = few_shot_rows()
    # Rows of one of the micro-batches share nothing.
    strangers = [example([place * n % 499 for place in range(1, 40)], 9) for n in range(3, 9)]
    parts = [rows, strangers, [*rows[3:], *rows]]

    def learned() -> list[torch.Tensor]:
        model.zero_grad()
        for each in parts:
            laid = lay_out(each, 0, "single", shares=True)
            assert (laid.batch.labels is None) == (each is strangers)
            assert len(laid.batch.input_ids) == 1
            loss: Any = scored(model, laid, HeadForm(), False).log_probs.sum()
            loss.backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    plain = learned()
    use_block_attention()
    kind, cpu = TensorKind(several=False, masked=True), torch.device("cpu")

    assert (
        compile_layers(model, cpu, torch.float32, "single", kind, HeadForm(), False, tmp_path) == ""
    )
    untyped: Any = dynamo
    with untyped.patch(error_on_recompile=True):
        fast = learned()
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert not all(torch.equal(one, other) for one, other in zip(plain, fast, strict=True))


def under_one_prompt(rows: list[Example]) -> list[Example]:
    """Return rows with 40 tokens before each."""
    system = [7 * place % 5000 + 4 for place in range(40)]

    def longer(each: Example) -> Example:
        return replace(example([*system, *each.input_ids], _answer(each)), row=each.row)

    return [
        longer(each)
        if each.rejected is None
        else pair(
            [*system, *each.input_ids[: -_answer(each)]],
            list(each.input_ids[-_answer(each) :]),
            list(each.rejected.input_ids[-_answer(each.rejected) :]),
        )
        for each in rows
    ]


def _answer(each: Example) -> int:
    return sum(label != -100 for label in each.labels)


@pytest.mark.parametrize("task", ["sft", "dpo", "orpo", "simpo", "kto"])
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_steps_have_the_losses_that_they_have_without(
    task: str,
    tuner: str,
    begin: Callable[..., Any],
    record: Any,
    examples: list[Example],
    pairs: list[Example],
    judged: list[Example],
) -> None:
    rows = under_one_prompt({"sft": examples, "kto": judged}.get(task, pairs))
    same = {
        "train": rows, "val": rows[:3], "task": task, "tuner": tuner, "total_steps": 3,
        "steps_per_epoch": 2, "per_device_train_batch_size": 4, "max_length": 128,
        "chunked_loss": True,
    }  # fmt: skip
    found = []
    for shares in (False, True):
        record.steps.clear()
        record.evaluations.clear()
        run(begin(**same, shares=shares), TrainState())
        found.append(
            [
                *(each.loss for each in record.steps),
                *(each.grad_norm for each in record.steps),
                *(each.tokens for each in record.steps),
                *(each.eval_loss for each in record.evaluations),
            ]
        )

    assert found[1] == pytest.approx(found[0], rel=2e-5)


def test_rows_of_several_prompts_meet_by_prompt_and_learn_the_same(
    begin: Callable[..., Any], record: Any, examples: list[Example]
) -> None:
    prompts = [[place * n % 5000 + 4 for place in range(40)] for n in (7, 11, 13)]
    rows = [
        example([*prompts[number % 3], *each.input_ids], _answer(each))
        for number, each in enumerate([*examples, *reversed(examples)])
    ]
    lengths = tuple(len(each.input_ids) for each in rows)
    known = beginnings([each.input_ids for each in rows])
    data = DataFacts(lengths, (1,) * len(rows), 0, None, 128, 128, 0, beginnings=known)
    losses, met, computed = [], [], 0
    for shares in (False, True):
        record.steps.clear()
        session = begin(
            train=rows, shares=shares, total_steps=3, steps_per_epoch=2, max_length=128,
            per_device_train_batch_size=3, gradient_accumulation_steps=3,
        )  # fmt: skip
        steps = [loop._share(session, TrainState(step=step)) for step in (0, 1)]
        micros = [[each.step[i] for (i,) in items] for each in steps for items in each.micros]
        met.append(sum(len({row.input_ids[1] for row in micro}) for micro in micros))
        computed = sum(map(computed_tokens, micros))
        run(session, TrainState())
        losses.append([each.loss for each in record.steps])

    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    assert met[1] < met[0]
    # The planner has foreseen which rows meet.
    assert spared_share(data, 3, 9, 42) == pytest.approx(1 - computed / sum(lengths))


def computed_tokens(rows: list[Example]) -> int:
    """Return how many tokens of a micro-batch are computed where beginnings are shared."""
    ids = [each.input_ids for each in rows]
    lengths = list(map(len, ids))
    lines = shared_lines(range(len(ids)), lengths, beginnings(ids), "lines")
    return sum(line_tokens(each, lengths) for each in lines)


def test_notes_of_a_reference_are_the_same(begin: Callable[..., Any], pairs: list[Example]) -> None:
    import torch

    rows = under_one_prompt(pairs)
    same = {
        "train": rows, "task": "dpo", "precompute_ref_log_probs": True, "max_length": 128,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    plain, shared = (begin(**same, shares=shares).reference.notes for shares in (False, True))
    for each in rows:
        torch.testing.assert_close(shared[id(each)], plain[id(each)], atol=1e-5, rtol=1e-5)


def test_a_run_that_goes_on_ends_with_the_same_bytes(
    begin: Callable[..., Any], examples: list[Example]
) -> None:
    import torch

    same = {
        "train": under_one_prompt(examples), "total_steps": 4, "steps_per_epoch": 2, "shares": True,
        "save_steps": 2, "per_device_train_batch_size": 4, "max_length": 128,
    }  # fmt: skip
    whole = begin(**same)
    run(whole, TrainState())
    rest = begin(**same)
    found = checkpoint.checkpoint_path(rest.checkpoints, 2)
    state = checkpoint.restore(found, rest.model, rest.optimizer, rest.names, rest.device)
    run(rest, state)
    expected = dict(trained_parameters(whole.model))

    assert state.step == 2
    for name, value in trained_parameters(rest.model):
        assert torch.equal(value, expected[name])


def test_a_run_of_before_goes_on_without(tiny_model: Path, tmp_path: Path) -> None:
    request = TrainRequest(output_dir=str(tmp_path), max_length=64)
    asked = replace(request, resume="last"), frozenset({"resume", "output_dir"})
    rundir.write_document(tmp_path, rundir.REQUEST, request)
    for shares in (True, False):
        rundir.write_document(tmp_path, rundir.PLAN, tiny_plan(tiny_model, prefix_sharing=shares))

        assert resumed_request(*asked)[1].prefix_sharing == ("auto" if shares else "off")
    for name in (rundir.REQUEST, rundir.PLAN):
        stored = json.loads((tmp_path / name).read_text())
        del stored["prefix_sharing"]
        (tmp_path / name).write_text(json.dumps(stored))

    assert resumed_request(*asked)[1].prefix_sharing == "off"


@pytest.mark.slow
def test_a_command_shares_what_its_rows_begin_with(tiny_model: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "You sort the letters of a bank's customers by topic."}
    turns = [
        [
            system,
            {"role": "user", "content": f"{what} is {how}"},
            {"role": "assistant", "content": what},
        ]
        for what in ("card", "cash", "fee", "loan")
        for how in ("late", "lost", "too high", "not what I asked for", "gone")
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    losses, plans = [], []
    for sharing in ("auto", "off"):
        path = tmp_path / sharing
        asked = [
            "--model", str(tiny_model), "--dataset", str(rows), "--output-dir", str(path),
            "--device", "cpu", "--threads", "1", "--dtype", "float32", "--max-steps", "3",
            "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2",
            "--label-accuracy", "off", "--prefix-sharing", sharing,
        ]  # fmt: skip
        command = [sys.executable, "-m", "mst", "train", *asked]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "note" not in done.stdout
        plans.append(rundir.read_document(Plan, path, rundir.PLAN))
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        losses.append([each.get("loss", each.get("eval_loss")) for each in lines])

    assert [each.prefix_sharing for each in plans] == [True, False]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert plans[0].memory.peak_bytes < plans[1].memory.peak_bytes
