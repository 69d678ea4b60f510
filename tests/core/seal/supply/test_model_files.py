"""A model directory shows only its own files, and names no code."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from mst.errors import ModelError
from mst.model.facts import read_facts
from mst.model.files import read_header, weight_files
from mst.model.locate import locate
from mst.seal.supply.model_files import check_adapter_files, check_model_files


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def change(path: Path, **fields: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **fields}))


def test_an_ordinary_model_passes(model: Path) -> None:
    (model / "modeling_x.py").write_text("")
    (model / "pytorch_model.bin").write_bytes(b"never read")
    check_model_files(model)

    assert read_facts(model).layers == 2


@pytest.mark.parametrize("name", ["vocab.json", "config.json", "model.safetensors", "notes.txt"])
def test_a_link_out_of_the_directory_is_refused(model: Path, name: str) -> None:
    secret = model.parent / "id_ed25519"
    secret.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(ModelError, match=rf"{name} is a link to .*id_ed25519, outside"):
        locate(str(model), (), {})
    with pytest.raises(ModelError, match="outside"):
        read_facts(model)


def test_a_hub_cache_with_its_links_is_read(model: Path, tmp_path: Path) -> None:
    """huggingface_hub's layout: a snapshot of links into the blobs beside it."""
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, each in enumerate(sorted(model.iterdir())):
        shutil.copy(each, repository / "blobs" / str(number))
        (snapshot / each.name).symlink_to(f"../../blobs/{number}")
    source = locate("org/tiny", (), {"HF_HUB_CACHE": str(tmp_path / "hub"), "HOME": "/nowhere"})

    assert source.path == snapshot
    assert read_facts(source.path).layers == 2

    (snapshot / "vocab.json").symlink_to("../../refs")
    with pytest.raises(ModelError, match="outside"):
        locate(str(snapshot), (), {})


def test_the_directory_itself_may_be_a_link_and_hold_links_to_its_own(model: Path) -> None:
    link = model.with_name("link")
    link.symlink_to(model)
    (model / "LICENSE").symlink_to("config.json")

    assert read_facts(locate(str(link), (), {}).path).layers == 2


def test_a_name_that_steers_the_terminal_is_refused_and_not_shown(model: Path) -> None:
    (model / "a\x1b[2J.json").write_text("{")
    with pytest.raises(ModelError, match="holds a file with the name") as raised:
        locate(str(model), (), {})

    assert str(raised.value).isprintable()


@pytest.mark.parametrize("method", ["evil.module.Class", "\x1b[2J", ["x"], None])
def test_weights_for_another_tools_class_are_refused(model: Path, method: object) -> None:
    change(model / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match="has quantized") as raised:
        read_facts(model)

    assert str(raised.value).isprintable()


def test_a_pipe_is_refused_and_not_waited_for(model: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(model / "generation_config.json")
    with pytest.raises(ModelError, match="no plain file"):
        locate(str(model), (), {})


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"_attn_implementation_internal": "evil/kernel"}),  # CVE-2026-4372
        ("config.json", {"_experts_implementation_internal": "evil/kernel"}),
        ("config.json", {"attn_implementation": "evil/kernel:function"}),
        ("config.json", {"text_config": {"_attn_implementation": {"text": "evil/kernel"}}}),
        ("config.json", {"keypoint_detector_config": {"trust_remote_code": True}}),  # -5241
        ("tokenizer_config.json", {"trust_remote_code": True}),
        ("generation_config.json", {"trust_remote_code": True}),
        ("preprocessor_config.json", {"trust_remote_code": 1}),
    ],
)
def test_a_field_that_leads_to_code_is_refused(
    model: Path, file: str, fields: dict[str, Any]
) -> None:
    change(model / file, **fields)
    with pytest.raises(ModelError, match="runs no code that comes with a model"):
        locate(str(model), (), {})


def test_an_implementation_of_transformers_own_is_fine(model: Path) -> None:
    change(model / "config.json", _attn_implementation="sdpa", attn_implementation=None)
    check_model_files(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "too deeply"),
        ('{"a": "' + "x" * (17 << 20) + '"}', "more than 16 MiB"),
        ('{"model_type": "llama"', "not valid JSON"),
        ('{"a": NaN} {', "not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_json_bomb_is_refused(model: Path, name: str, text: str, message: str) -> None:
    (model / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        locate(str(model), (), {})


def test_a_tokenizer_nested_too_deeply_is_refused(model: Path) -> None:
    from mst.data.special import special_tokens
    from mst.data.tokens import load_tokenizer

    (model / "tokenizer.json").write_text('{"model":' + "[" * 50_000 + "]" * 50_000 + "}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(model)
    with pytest.raises(ModelError, match="nested too deeply"):
        special_tokens(model)


def test_an_oversized_tokenizer_is_refused_unread(model: Path) -> None:
    os.truncate(model / "tokenizer.json", 600 << 20)  # sparse: it takes no space
    with pytest.raises(ModelError, match="more than 512 MiB"):
        locate(str(model), (), {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**12), ("num_hidden_layers", 10**9), ("vocab_size", 10**15),
        ("max_position_embeddings", 10**15), ("vision_config", {"hidden_size": 10**12}),
        ("vision_config", {"inner": {"num_hidden_layers": 10**9}}),
    ],
)  # fmt: skip
def test_a_size_that_no_model_has_allocates_nothing(model: Path, key: str, value: Any) -> None:
    change(model / "config.json", **{key: value})
    with pytest.raises(ModelError, match="which no model has"):
        read_facts(model)


def safetensors(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        safetensors({"a": tensor(0, 8, shape=(2,)), "b": tensor(4, 8)}),  # overlap
        safetensors({"a": tensor(4, 8)}, b"\0" * 8),  # a gap in front
        safetensors({"a": tensor(0, 4, "F16")}, b"\0" * 4),  # the dtype lies
        safetensors({"a": tensor(0, 8, shape=(2**61, 2**61))}),  # the shape lies
        safetensors({"a": tensor(0, 8, shape=(-2, -1))}),
        safetensors({"a": tensor(8, 0)}),
        safetensors({"a": tensor(0, 8, shape=(True, 2))}),
        safetensors({"a": tensor(0, 2**63)}),
        safetensors(b'{"a":' * 10_000),
        safetensors(
            b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},'
            b'"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}'
        ),
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}" * 100,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"damaged|truncated|not a whole"):
        read_header(path)


def test_a_true_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        safetensors({"b": tensor(4, 8), "a": tensor(0, 4), "c": tensor(8, 8, shape=(0,))})
    )

    assert set(read_header(path)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/x.safetensors", "pytorch_model.bin", 7, None]
)
def test_an_index_that_points_elsewhere_is_refused(model: Path, name: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"index\.json is damaged, or names files"):
        weight_files(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'"),
        ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "module to import"),
        ({"peft_type": None}, "peft_type 'None'"),
    ],
)
def test_an_adapter_that_names_code_is_refused(
    finished_run: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    check_adapter_files(adapter)
    change(adapter / "adapter_config.json", **fields)
    with pytest.raises(ModelError, match=message):
        check_adapter_files(adapter)


def test_an_adapters_base_and_mapping_are_not_followed(
    finished_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A hub's name, another directory and a module to import stand there; none is used."""
    import torch

    from mst.training.adapters import load_model, with_adapter

    for base in ("attacker/base", str(tmp_path / "attacker")):
        adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
        mapping = {"base_model_class": "X", "parent_library": "attacker_module"}
        change(
            adapter / "adapter_config.json", base_model_name_or_path=base, auto_mapping=mapping,
            revision="main",
        )  # fmt: skip
        (tmp_path / "attacker_module.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
        model = load_model(tiny_model, "float32", "sdpa", torch.device("cpu"))
        loaded = with_adapter(model, str(adapter))

        assert any("lora_A" in name for name, _ in loaded.named_parameters())
        assert not (tmp_path / "marker").exists()
        shutil.rmtree(adapter)


def test_a_pickled_adapter_is_refused_with_the_converting_command(
    finished_run: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="mst models convert"):
        check_adapter_files(adapter)


@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz", "m.tgz", "m.zip", "M.ZIP", "m.tar.zst"])
def test_an_archive_is_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    with pytest.raises(ModelError, match=r"is an archive.*opens no archive"):
        locate(str(tmp_path / name), (), {})
