"""Adapters that begin with what 4 bits have lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mst.data.encode import Example
from mst.request import TrainRequest
from mst.training.adapters import load_model, lora_config, prepare_model
from mst.training.lora_init import begin_with_error, wanted
from mst.training.quantization import dequantized_weight, quantized_layers

CPU = torch.device("cpu")
# Widths that no block of 64 fits; GPT-2's layers are stored transposed, and its c_proj is square.
SHAPES = {
    "llama": {
        "hidden_size": 40, "intermediate_size": 71, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 36, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


def save(kind: str, directory: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 6400, "tie_word_embeddings": False, **SHAPES[kind]}
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_config(CONFIG_MAPPING[kind](**sizes))
    for each in model.parameters():  # inputs of unlike scales, as real models have them
        each.data *= 1 + 4 * torch.rand(each.shape[-1])
    model.save_pretrained(directory)


def adapted(directory: Path, rank: int = 4) -> Any:
    model = load_model(directory, "float32", "eager", CPU, "nf4")
    torch.manual_seed(0)
    return prepare_model(model, lora_config(TrainRequest(lora_rank=rank)))


def logits(model: Any, examples: list[Example]) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        rows = [torch.tensor([each.input_ids.tolist()]) for each in examples]
        return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in rows])


# PEFT 0.21 says this of every Conv1D.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_step_is_nearer_to_the_model_that_was_quantized(
    tmp_path: Path, examples: list[Example], kind: str
) -> None:
    save(kind, tmp_path)
    expected = logits(load_model(tmp_path, "float32", "eager", CPU), examples)
    model = adapted(tmp_path, rank=16)
    held = {name: dequantized_weight(each) for name, each in quantized_layers(model)}
    before = (logits(model, examples) - expected).square().mean()
    layers = begin_with_error(model, tmp_path, examples, CPU)
    after = (logits(model, examples) - expected).square().mean()

    assert layers == len(held)
    assert after < 0.6 * before
    for name, each in quantized_layers(model):
        assert torch.equal(dequantized_weight(each), held[name])


def test_at_full_rank_nothing_is_lost(tmp_path: Path, examples: list[Example]) -> None:
    save("llama", tmp_path)
    expected = logits(load_model(tmp_path, "float32", "eager", CPU), examples)
    model = adapted(tmp_path, rank=71)
    begin_with_error(model, tmp_path, examples, CPU)

    torch.testing.assert_close(logits(model, examples), expected, rtol=1e-3, atol=1e-3)


def test_it_is_the_same_each_time_and_draws_nothing_from_the_run(
    tmp_path: Path, examples: list[Example]
) -> None:
    save("llama", tmp_path)
    states = []
    for seed in (1, 2):
        model = adapted(tmp_path)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        begin_with_error(model, tmp_path, examples, CPU)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(copy.deepcopy(model.state_dict()))

    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())


def test_a_layer_that_the_files_name_otherwise_begins_as_ever(
    tmp_path: Path, examples: list[Example]
) -> None:
    from safetensors.torch import load_file, save_file

    save("llama", tmp_path)
    model = adapted(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors["other"] = tensors.pop(f"{name}.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    layers = begin_with_error(model, tmp_path, examples, CPU)
    skipped = model.get_submodule(f"base_model.model.{name}")

    assert layers == 13
    assert not skipped.lora_B["default"].weight.any()


@pytest.mark.parametrize(
    ("quantization", "asked", "dora", "expected"),
    [
        ("nf4", "auto", False, True),
        ("int8", "auto", False, False),
        ("int8", "qera", False, True),
        ("nf4", "default", False, False),
        ("nf4", "qera", True, False),
        ("none", "qera", False, False),
    ],
)
def test_which_runs_begin_so(quantization: str, asked: str, dora: bool, expected: bool) -> None:
    request = TrainRequest(init_lora_weights=asked, use_dora=dora)

    assert wanted(quantization, request) is expected
