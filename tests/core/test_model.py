"""Finding models and knowing them without torch."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mst.chat import choose_model
from mst.errors import ModelError
from mst.model.facts import lora_parameters, lora_targets, read_facts
from mst.model.locate import locate


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_facts_equal_what_torch_counts(tiny_model: Path) -> None:
    from peft import LoraConfig

    from mst import serial
    from mst.model.facts import ModelFacts
    from mst.training.adapters import load_model, prepare_model

    torch = pytest.importorskip("torch")
    facts = read_facts(tiny_model)
    model = load_model(tiny_model, "float32", "sdpa", torch.device("cpu"))
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    tuned = prepare_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)

    assert lora_parameters(lora_targets(facts, ("all-linear",)), 4) == trained
    assert serial.from_json(ModelFacts, serial.to_json(facts)) == facts


def test_facts_need_no_torch(tiny_model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mst.model.facts import read_facts;"
        f"read_facts(Path({str(tiny_model)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_targets_that_match_nothing_name_what_there_is(tiny_model: Path) -> None:
    facts = read_facts(tiny_model)

    assert {each.name.split(".")[-1] for each in lora_targets(facts, ("q_proj", "v_proj"))} == {
        "q_proj", "v_proj",
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"matches no linear layer .*q_proj"):
        lora_targets(facts, ("c_attn",))


def test_truncated_weights_are_found_without_loading(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated .* asks for \d+ bytes"):
        read_facts(copy)


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 1 << 60) + b"{}" * 50])
def test_a_file_that_is_no_safetensors_is_refused(copy: Path, data: bytes) -> None:
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_facts(copy)


def test_pickles_are_refused_with_a_command_that_converts(copy: Path, tiny_model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="a pickle") as raised:
        read_facts(copy)
    command = str(raised.value).split("runs nothing of it: ")[1]
    subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        check=True,
        capture_output=True,
        cwd=copy.parent,
    )

    converted = read_facts(copy.parent / f"{copy.name}-safetensors")
    assert converted.parameters == read_facts(tiny_model).parameters


def test_a_config_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        read_facts(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks 1 of 2 weight files: model-00001-of-00002"):
        read_facts(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}'])
def test_a_damaged_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_facts(copy)


def test_an_empty_directory_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json \(found: nothing\)"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("place", "environ"),
    [
        ("org/tiny", {"MST_MODELS": "{root}"}),
        ("tiny", {"MST_MODELS": "/nowhere:{root}"}),
        ("models/org/tiny", {"MODELSCOPE_CACHE": "{root}"}),
        ("hub/models/org/tiny", {"MODELSCOPE_CACHE": "{root}"}),
        ("hub/models--org--tiny/snapshots/abc", {"HF_HOME": "{root}"}),
        (".cache/huggingface/hub/models--org--tiny/snapshots/abc", {"HOME": "{root}"}),
    ],
)
def test_a_name_is_found_in_local_places(
    tiny_model: Path, tmp_path: Path, place: str, environ: dict[str, str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / place)
    if "snapshots" in place:
        refs = (tmp_path / place).parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("abc")
    found = locate(
        "org/tiny", (), {key: value.format(root=tmp_path) for key, value in environ.items()}
    )

    assert found.path == tmp_path / place
    assert found.name == "org/tiny"


def test_a_name_that_is_nowhere_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        locate("org/none", (str(tmp_path / "mine"),), {"HOME": str(tmp_path), "HF_HOME": "/hf"})

    for place in (f"{tmp_path}/mine/org/none", "never downloads", "--models-dir", "MST_MODELS"):
        assert place in str(raised.value)


def test_a_path_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match=r"--model \./none does not exist"):
        locate("./none", (), {})


def test_what_was_typed_without_an_option_is_not_told_of_with_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "model.zip").touch()
    for typed in ("none", "./none", str(tmp_path / "notes.txt"), str(tmp_path / "model.zip")):
        with pytest.raises(ModelError) as raised:
            choose_model(typed, None, {"HOME": str(tmp_path)}, tmp_path / "runs")

        assert typed in str(raised.value)
        assert "--model" not in str(raised.value)
        assert typed != "none" or f"{tmp_path}/runs/none, " in str(raised.value)


def test_a_read_only_model_directory_will_do(copy: Path) -> None:
    for each in [*copy.iterdir(), copy]:
        each.chmod(0o555 if each.is_dir() else 0o444)

    assert read_facts(copy).layers == read_facts(copy).layers
    copy.chmod(0o755)
