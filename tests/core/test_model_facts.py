"""A model's facts from its files, or from its class where the files don't tell."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mst.errors import ModelError
from mst.model.facts import read_facts


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_files_and_class_say_the_same(tiny_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    files = read_facts(tiny_model, tell=said.append)
    built = read_facts(tiny_model, weights=False, tell=said.append, cache_dir=tmp_path)
    files, built = (
        replace(each, weight_bytes=0, dtype="", linears=tuple(sorted(each.linears, key=str)))
        for each in (files, built)
    )

    assert replace(files, source="trace") == built
    assert (files.source, built.source, len(said)) == ("headers", "trace", 1)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 128}, 128),
        ({"sliding_window": 128, "use_sliding_window": False}, None),
        ({"sliding_window": 128, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]}, 128),
        ({"attention_chunk_size": 64, "layer_types": ["chunked_attention"] * 2}, 64),
    ],
)
def test_layers_that_see_less_than_everything_are_known(
    copy: Path, values: dict[str, Any], window: int | None
) -> None:
    change(copy, **values)

    assert read_facts(copy).window == window


def test_a_class_is_asked_once_for_a_config(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    said: list[str] = []
    first, second = (
        read_facts(copy, weights=False, tell=said.append, cache_dir=tmp_path) for _ in range(2)
    )

    assert first == second
    assert len(said) == 1


def test_a_tensor_of_an_unknown_name_asks_the_class(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["model.extra.weight"] = weights["model.norm.weight"].clone()
    save_file(weights, copy / "model.safetensors")
    facts = read_facts(copy, cache_dir=tmp_path)

    assert facts.source == "trace"
    assert facts.parameters == sum(each.numel() for each in weights.values()) - 64


def test_an_unknown_architecture_names_the_nearest(copy: Path, tmp_path: Path) -> None:
    change(copy, model_type="lllama", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(ModelError, match=r"'lllama', which transformers .* llama.* never runs"):
        read_facts(copy, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 0), ("hidden_size", -64), ("num_hidden_layers", 10**9), ("vocab_size", 1.5)],
)
def test_a_size_that_no_model_has(copy: Path, key: str, value: float) -> None:
    change(copy, **{key: value})
    with pytest.raises(ModelError, match=rf"config\.json is damaged: {key} is {value}"):
        read_facts(copy)


@pytest.mark.parametrize(
    ("key", "factor"), [("hidden_size", 2), ("num_hidden_layers", 2), ("vocab_size", 3)]
)
def test_a_config_of_another_model(copy: Path, key: str, factor: int) -> None:
    change(copy, **{key: json.loads((copy / "config.json").read_text())[key] * factor})
    with pytest.raises(ModelError, match=rf"{key} \d+|layers.* hold \d+"):
        read_facts(copy)


def test_quantized_weights_are_refused_but_can_be_planned_for(copy: Path, tmp_path: Path) -> None:
    change(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"gptq has quantized; .*--tuner qlora"):
        read_facts(copy)

    assert read_facts(copy, weights=False, cache_dir=tmp_path).linears
