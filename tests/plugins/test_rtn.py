"""A rounded copy is whole and near its model; what the layouts can't hold is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mst.errors import ModelError
from mst.model.files import read_config
from mst.training.sealed_directory import write_sealed
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.layouts.rounding import dequantize
from mst_plugins.quantized_model import Scheme, decoder_linears, faults
from mst_plugins.rtn import round_model

if TYPE_CHECKING:
    import torch

SCHEMES = [
    Scheme(name, bits, 32, symmetric)
    for name, layout in LAYOUTS.items()
    for bits in layout.BITS
    for symmetric in layout.SYMMETRIC
]
NAMES = [f"{each.layout}-{each.bits}-{each.symmetric}" for each in SCHEMES]


def rounded(source: Path, target: Path, scheme: Scheme) -> Path:
    """Return `target`, a rounded copy of `source`."""
    linears = decoder_linears(source)
    write_sealed(target, lambda directory: round_model(source, directory, linears, scheme))
    return target


def weights(model: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model directory."""
    from safetensors.torch import load_file

    return {
        name: each for path in model.glob("*.safetensors") for name, each in load_file(path).items()
    }


def saved(directory: Path, kind: str, shard: str = "5GB", **sizes: Any) -> Path:
    """Save a model with random weights of an architecture, and return its directory."""
    import torch
    import transformers

    torch.manual_seed(0)
    known: Any = transformers
    config = getattr(known, f"{kind}Config")(vocab_size=96, **sizes)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    getattr(known, name)(config).save_pretrained(directory, max_shard_size=shard)
    return directory


SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_every_decoder_linear_is_rounded_and_nothing_else(
    tiny_model: Path, tmp_path: Path, scheme: Scheme
) -> None:
    import torch

    target = rounded(tiny_model, tmp_path / "rounded", scheme)
    linears = decoder_linears(tiny_model)
    before, after = weights(tiny_model), weights(target)
    quantization = read_config(target).pop("quantization_config")

    assert read_config(target) == {
        **read_config(tiny_model), "quantization_config": quantization
    }  # fmt: skip
    assert (target / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert faults(target, linears, scheme) == []
    for each in linears:
        prefix = f"{each.name}."
        tensors = {
            name.removeprefix(prefix): after.pop(name)
            for name in sorted(after)
            if name.startswith(prefix)
        }
        weight = before.pop(f"{each.name}.weight")
        again = dequantize(LAYOUTS[scheme.layout].unpack(tensors, scheme.bits))
        step = weight.abs().max() * 2 / (2**scheme.bits - 1)

        assert (again - weight).abs().max() <= step
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_stay_shards_and_biases_stay_whole(tmp_path: Path) -> None:
    import torch

    source = saved(tmp_path / "qwen", "Qwen2", shard="100KB", **SMALL)
    target = rounded(source, tmp_path / "rounded", SCHEMES[0])
    index = json.loads((target / "model.safetensors.index.json").read_text())
    before, after = weights(source), weights(target)
    biases = [name for name in before if name.endswith(".bias")]

    assert len({path.name for path in target.glob("*.safetensors")}) > 2
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in after.values())
    assert biases
    assert all(torch.equal(before[name], after[name]) for name in biases)


def test_transposed_weights_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "gpt2", "GPT2", n_embd=64, n_layer=1, n_head=2)

    with pytest.raises(ModelError, match=r"transformer.h.0.*GPT-2.*--format merged"):
        decoder_linears(source)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 64}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16}),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
def test_experts_are_refused(kind: str, sizes: dict[str, int], tmp_path: Path) -> None:
    source = saved(tmp_path / "moe", kind, **SMALL | sizes)

    with pytest.raises(ModelError, match="4 experts a layer"):
        decoder_linears(source)


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"^model.layers.1.mlp.up_proj: the weight holds NaN"):
        rounded(source, tmp_path / "rounded", SCHEMES[0])
    assert not (tmp_path / "rounded").exists()
