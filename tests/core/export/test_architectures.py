"""Models of other makes are exported and pass, or are refused before any work, with a way on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.core.images.conftest import COLOURS, asked
from tests.core.images.tiny_models import FAMILIES

from mst.cli import main

DATA = Path(__file__).resolve().parents[2] / "data"
QUANTIZED = (
    ("gptq",), ("awq",), ("compressed-tensors",), ("turbomind",), ("gptq", "--method", "rtn")
)  # fmt: skip
# Why each is not quantized. In Mixtral's files the experts have other names than in memory, and lie
# one by one; Qwen2.5-VL's have other names too.
REFUSED = {
    "Mixtral": "4 experts a layer, which are not quantized",
    "GPT2": "as where a model's layers are transposed (GPT-2)",
    "qwen2_5_vl": "reads images, and is not quantized here",
}


def text_model(kind: str, path: Path) -> None:
    """Save a model of text with random weights in bfloat16."""
    import torch
    import transformers

    known: Any = transformers
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 1, "n_head": 2}
    if kind != "GPT2":
        sizes = {
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4,
        }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(known, f"{kind}Config")(
        vocab_size=6400, bos_token_id=1, eos_token_id=2, **sizes
    )
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    getattr(known, name)(config).bfloat16().save_pretrained(path)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tokenizers/minimind" / each, path)


def pictures(directory: Path) -> Path:
    """Return rows that ask for the colour of a square."""
    from PIL import Image

    rows = []
    for number, (name, colour) in enumerate([*COLOURS.items()] * 3):
        Image.new("RGB", (28, 28), colour).save(directory / f"{number}.png")
        rows.append(asked("<image>what colour?", name) | {"images": [f"{number}.png"]})
    path = directory / "squares.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mst(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_quantized_is_refused_and_exports_merged(
    kind: str, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run, rows = tmp_path / "model", tmp_path / "run", chat_rows
    if kind in FAMILIES:
        FAMILIES[kind](model)
        rows = pictures(tmp_path)
    else:
        text_model(kind, model)
    trained = mst(
        "train", "--model", model, "--dataset", rows, "--output-dir", run, "--device", "cpu",
        "--threads", 1, "--max-steps", 1, "--val-size", 4, "--learning-rate", 0.01,
        "--label-accuracy", "off",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    capsys.readouterr()

    for arguments in QUANTIZED:
        code = main(["export", str(run), "--format", *arguments])
        said = capsys.readouterr().err

        assert code == 1
        assert REFUSED[kind] in said or "TurboMind of lmdeploy" in said
        assert "Export it with --format merged" in said
    assert not (run / "export").exists()

    done = mst("export", run)
    manifest = json.loads((run / "export/merged/manifest.json").read_text())

    assert done.returncode == 0, done.stdout + done.stderr
    assert (manifest["status"], manifest["faults"]) == ("passed", [])
    assert ("without their images" in manifest["judged_from"]) == (kind in FAMILIES)


def test_a_weight_that_is_not_the_cast_one_is_a_fault(tiny_model: Path) -> None:
    import copy

    import torch

    from mst.export.gate import put_weights
    from mst.export.loaded import cast_faults, loaded_weights
    from mst.training.adapters import load_model

    trained = load_model(tiny_model, "float32", "sdpa", torch.device("cpu"))
    stored = copy.deepcopy(trained)

    assert put_weights(stored, loaded_weights(tiny_model)) == []
    assert cast_faults(trained, stored, "float32") == []
    assert len(cast_faults(trained, stored, "bfloat16")) > 10
    with torch.no_grad():
        stored.get_parameter("model.norm.weight")[0] += 1e-6
    assert cast_faults(trained, stored, "float32") == [
        "model.norm.weight is not what was trained, cast to float32"
    ]
