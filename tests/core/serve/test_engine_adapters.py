"""Several adapters on one base: each answer in a mixed batch is that of its adapter alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.serve.conftest import Start, ask, random_ids, random_model, transformers_answer

from mst.errors import ModelError
from mst.serve.row_adapters import MixedRows, RowAdapters, read_layers
from mst.training.adapters import quiet_peft

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    # One of these layers sees all tokens as one line.
    "qwen2_moe": {"target_modules": ["o_proj", "shared_expert_gate"], "use_rslora": True},
}


def saved_adapter(model: Any, path: Path, seed: int, **options: Any) -> Any:
    """Write a random adapter; return the model with it, as PEFT runs it."""
    from peft import LoraConfig, get_peft_model

    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    with quiet_peft():
        whole: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**chosen | options))
    for name, each in whole.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(each, std=0.4)
    whole.eval().save_pretrained(path, save_embedding_layers=False)
    return whole


def alone(whole: Any, ids: list[int], new: int = 12) -> list[int]:
    return transformers_answer(whole, ids, new)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_with_adapters_in_one_batch_are_those_of_each_alone(
    kind: str, tmp_path: Path, start: Start
) -> None:
    shape: dict[str, Any] = {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    model = random_model(kind, **(shape if kind == "qwen2_moe" else {}))
    options = KINDS[kind]
    wholes = {
        name: saved_adapter(model, tmp_path / name, seed, **options)
        for seed, name in enumerate("ab")
    }
    keys = set(model.state_dict())
    rows = RowAdapters(model)
    for name in wholes:
        rows.add(name, read_layers(model, str(tmp_path / name), torch.float32))
    engine = start(model, rows, batch=5, prefill_tokens=40)
    asked = [(name, random_ids(5 + 4 * place, place)) for place, name in enumerate("abababab")]
    asked[2] = asked[5] = asked[6] = (None, random_ids(13, 9))  # type: ignore[assignment]
    heard = [ask(engine, ids, adapter=name) for name, ids in asked]
    # All of them, before the base is used here: its hooks follow what the engine does.
    found = [each.ids() for each in heard]

    assert found == [alone(wholes.get(name, model), ids) for name, ids in asked]
    assert len({tuple(alone(each, random_ids(13, 9))) for each in (model, *wholes.values())}) == 3
    assert engine.adapters == ("a", "b")
    assert set(model.state_dict()) == keys
    assert not hasattr(model, "peft_config")


def test_an_answer_with_one_adapter_at_a_time(tmp_path: Path, start: Start) -> None:
    model = random_model("mamba", attention="eager")
    whole = saved_adapter(model, tmp_path / "a", 1, target_modules=["in_proj"])
    rows = RowAdapters(model)
    rows.add("a", read_layers(model, str(tmp_path / "a"), torch.float32))
    engine = start(model, rows)
    ids = random_ids(9, 0)
    heard = [ask(engine, ids, adapter=name) for name in ("a", None, "a")]
    found = [each.ids() for each in heard]

    assert found == [alone(each, ids) for each in (whole, model, whole)]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "changes biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "more than linear layers"),
    ],
)
def test_an_adapter_that_does_more_is_refused(
    options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = random_model("llama")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    saved_adapter(model, tmp_path / "a", 1, **{"target_modules": ["q_proj"]} | options)

    with pytest.raises(ModelError, match=why):
        read_layers(model, str(tmp_path / "a"), torch.float32)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_rows_that_a_layer_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    saved_adapter(model, tmp_path / "a", 1, target_modules=["q_proj"])
    rows = RowAdapters(model)
    rows.add("a", read_layers(model, str(tmp_path / "a"), torch.float32))
    layer = model.model.layers[0].self_attn.q_proj
    some = torch.randn(7, 32)

    with torch.inference_mode(), rows.chosen(["a", None], 5), pytest.raises(MixedRows):
        layer(some)
    with torch.inference_mode(), rows.chosen(["a", "a"], 5):
        uniform = layer(some)
    assert not torch.equal(uniform, layer(some))
