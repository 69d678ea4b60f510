"""A layer is read as one however its tensors lie in the shards, and no other beside it."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mst.model.facts import LinearShape
from mst_plugins.quantized_model import Scheme, decoder_linears, faults
from mst_plugins.repacking import repack
from mst_plugins.rtn import round_model
from mst_plugins.stored_layers import stored_layers
from mst_plugins.weights import unpacked_weights

GPTQ = Scheme("gptq", 4, 32, True)
COMPRESSED = Scheme("compressed-tensors", 4, 32, True)
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2, which has biases, in several shards."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path, max_shard_size="100KB")
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, packed as GPTQ's layout has it, each layer in one shard."""
    path = tmp_path_factory.mktemp("whole")
    round_model(source, path, decoder_linears(source), GPTQ)
    return path


@pytest.fixture(scope="module")
def split(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors, those of `LAYER` in as many shards as it has tensors."""
    path = shutil.copytree(whole, tmp_path_factory.mktemp("split") / "model")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    mine = [name for name in sorted(index["weight_map"]) if name.startswith(f"{LAYER}.")]

    assert len(shards) >= len(mine) == 4
    for name, shard in zip(mine, shards, strict=False):
        move(path, name, index["weight_map"][name], shard)
        index["weight_map"][name] = shard
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def move(directory: Path, name: str, before: str, after: str) -> None:
    from safetensors.torch import load_file, save_file

    source = load_file(directory / before)
    moved = source.pop(name)
    save_file(source, directory / before, metadata={"format": "pt"})
    target = load_file(directory / after)
    save_file(target | {name: moved}, directory / after, metadata={"format": "pt"})


@pytest.fixture
def others_set_aside() -> Iterator[None]:
    """Keep what other tests have left out of collections: to look through it takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> int:
    """Return the bytes of all tensors that something holds, but for those that are set aside."""
    import torch

    gc.collect()
    held = [each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum({each.data_ptr(): each.nbytes() for each in held}.values())


def test_a_split_layer_is_read_as_one_and_every_tensor_once(
    source: Path, whole: Path, split: Path
) -> None:
    found = {name: stored for _, name, stored in stored_layers(split)}
    layer = found[LAYER]

    assert isinstance(layer, dict)
    assert layer.keys() == {"g_idx", "qweight", "qzeros", "scales"}
    assert found.keys() == {name for _, name, _ in stored_layers(whole)}
    assert "model.layers.0.self_attn.q_proj.bias" in found
    assert faults(split, decoder_linears(source), GPTQ) == []


def test_its_weights_and_its_codes_in_another_layout_are_those_of_the_whole_model(
    source: Path, whole: Path, split: Path, tmp_path: Path
) -> None:
    import torch

    wanted = dict(unpacked_weights(whole))
    repack(split, source, tmp_path, "gptq", COMPRESSED)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())

    for found in (dict(unpacked_weights(split)), dict(unpacked_weights(tmp_path))):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert faults(tmp_path, decoder_linears(source), COMPRESSED) == []
    assert len(set(index["weight_map"].values())) > 2
    assert all((tmp_path / each).is_file() for each in index["weight_map"].values())


@pytest.mark.usefixtures("others_set_aside")
def test_one_weight_is_in_memory_at_a_time(split: Path) -> None:
    # Its codes are four bits; scales and zero points are small beside them.
    at_most = 1.3 * 128 * 64 * (4 + 4 / 8)
    for name, weight in unpacked_weights(split):
        assert weight.nbytes <= alive() <= at_most, name


def test_a_layer_that_is_not_packed_is_a_fault(source: Path, whole: Path) -> None:
    extra = [*decoder_linears(source), LinearShape("model.layers.2.mlp.up_proj", 128, 64)]

    assert faults(whole, extra, GPTQ) == ["model.layers.2.mlp.up_proj: it is not quantized"]
