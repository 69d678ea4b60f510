"""Image-text models learn from images, from a file to a merged model."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.images.conftest import asked
from tests.core.images.test_tokens import processor_of
from tests.core.images.tiny_models import FAMILIES

from mst.cli import main
from mst.data.encode import encode
from mst.data.formats import read
from mst.data.template import load_template
from mst.data.tokens import load_tokenizer
from mst.rundir import read_manifest, read_metrics, update_manifest

Find = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_to_see_and_the_tower_stays(
    vision_model: Find, family: str, squares: Path
) -> None:
    import torch

    from mst.request import TrainRequest
    from mst.training.adapters import load_model, lora_config, prepare_model, trained_parameters
    from mst.training.batches import collate
    from mst.training.loss import summed_loss

    directory = vision_model(family)
    tokenizer, template = load_tokenizer(directory), load_template(directory)
    examples = encode(read([str(squares)]).rows, tokenizer, template, None).examples
    torch.manual_seed(0)
    model = load_model(directory, "float32", "sdpa", torch.device("cpu"))
    model = prepare_model(model, lora_config(TrainRequest(lora_rank=16)))
    before = {name: each.clone() for name, each in model.named_parameters()}
    trained = dict(trained_parameters(model))
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    held_out = collate(examples[40:], tokenizer.pad_token_id, "padded", directory)
    # Each of four colours is asked for twice: who can't see loses log 4 a row at the least.
    blind = math.log(4) * 8 / held_out.label_tokens
    lowest = math.inf
    for step in range(200):
        chosen = [examples[(step * 8 + place) % 40] for place in range(8)]
        batch = collate(chosen, tokenizer.pad_token_id, "padded", directory)
        loss = summed_loss(model, batch, "kept") / batch.label_tokens
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                found = float(summed_loss(model, held_out, "kept")) / held_out.label_tokens
            lowest = min(lowest, found)
            if lowest < 0.75 * blind:
                break

    assert lowest < 0.75 * blind
    assert all("lora_" in name and "language_model" in name for name in trained)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def mst(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `mst` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "mst", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def options(model: Path, dataset: Path, run: Path) -> list[object]:
    """Return the options of a run of four steps."""
    return [
        "--model", model, "--dataset", dataset, "--output-dir", run, "--device", "cpu",
        "--max-steps", 4, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 1,
        "--learning-rate", 0.01, "--threads", 1, "--save-steps", 2, "--val-size", 8,
    ]  # fmt: skip


def adapter_bytes(run: Path) -> bytes:
    """Return the weights that a run ended with."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_with_images_trains_resumes_and_merges(
    vision_model: Find, squares: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    directory, run = vision_model("qwen2_5_vl"), tmp_path / "run"
    shutil.copytree(squares.parent, tmp_path / "data")
    rows = tmp_path / "data" / "rows.jsonl"
    done = mst("train", *options(directory, rows, run))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "the tower that sees them and its projector don't" in done.stdout
    assert read_manifest(run).data[0].images == 48
    assert len([each for each in read_metrics(run) if "loss" in each]) == 4
    # As a run that was stopped after step 2.
    ended = adapter_bytes(run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    update_manifest(run, status="failed")
    picture = (rows.parent / "5.png").read_bytes()
    (rows.parent / "5.png").write_bytes((rows.parent / "6.png").read_bytes())
    changed = mst("train", "--output-dir", run, "--resume")

    assert changed.returncode != 0
    assert "data of" in changed.stderr
    assert "has changed" in changed.stderr
    (rows.parent / "5.png").write_bytes(picture)
    resumed = mst("train", "--output-dir", run, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing after step 2" in resumed.stdout
    assert adapter_bytes(run) == ended

    merged = mst("merge", run)
    assert merged.returncode == 0, merged.stdout + merged.stderr
    untyped: Any = AutoModelForImageTextToText
    model = untyped.from_pretrained(run / "merged", dtype=torch.float32)
    turns = [{"role": "user", "content": [{"type": "image", "path": str(rows.parent / "0.png")}]}]
    inputs = processor_of(run / "merged", "qwen2_5_vl").apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert torch.isfinite(model(**inputs).logits).all()

    judged = mst("eval", run)
    assert judged.returncode != 0
    assert "mst eval judges text alone" in judged.stdout + judged.stderr


@pytest.mark.slow
def test_rows_of_text_train_an_image_text_model(
    vision_model: Find, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = mst("train", *options(vision_model("llava"), chat_rows, run))

    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(run).data[0].images == 0


@pytest.mark.parametrize(
    ("extra", "needle"),
    [
        (["--packing"], "rows with images are padded"),
        (["--tuner", "full"], "Pass --tuner lora or qlora"),
        (["--task", "kto"], "label"),
    ],
)
def test_what_images_exclude_is_refused(
    vision_model: Find,
    squares: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    needle: str,
) -> None:
    arguments = options(vision_model("qwen3_vl"), squares, tmp_path / "run")

    assert main(["plan", *map(str, arguments), *extra]) != 0
    assert needle in " ".join(capsys.readouterr().err.split())


def test_a_reward_or_a_stream_has_no_images(
    vision_model: Find, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kto.jsonl"
    image = str(squares.parent / "0.png")
    row = asked([{"type": "image", "path": image}, {"type": "text", "text": "q"}], "a")
    path.write_text("".join(json.dumps(row | {"label": at % 2 == 0}) + "\n" for at in range(20)))
    arguments = options(vision_model("qwen3_vl"), path, tmp_path / "run")

    assert main(["plan", *map(str, arguments), "--task", "kto"]) != 0
    assert "--task kto learns from text alone" in " ".join(capsys.readouterr().err.split())
    arguments = options(vision_model("qwen3_vl"), squares, tmp_path / "run")
    assert main(["plan", *map(str, arguments), "--streaming"]) != 0
    assert "which --streaming does not read" in " ".join(capsys.readouterr().err.split())


def test_the_forecast_counts_images(vision_model: Find, squares: Path, tmp_path: Path) -> None:
    from mst.data.prepare import data_facts, prepare
    from mst.request import TrainRequest
    from mst.workload import largest_step

    request = TrainRequest(dataset=(str(squares),), val_size=8.0)
    prepared = prepare(request, request.dataset, vision_model("qwen2_vl"), None)
    data = data_facts(prepared)
    shape = largest_step(data, 4, 8, 42, 10, "padded")
    # A patch of Qwen2-VL has 3 × 2 × 14 × 14 values; 56 × 56 pixels are sixteen of them. With them
    # come three numbers for the sides of the image.
    largest = 16 * 3 * 2 * 14 * 14 * 4 + 3 * 8

    assert data.images == 48
    assert max(data.image_bytes) == largest
    assert 2 * largest < shape.image_bytes <= 4 * largest
    assert data.answers is None
    assert data.longest == max(data.lengths) > 16


def test_named_modules_are_those_of_the_language_model_alone(vision_model: Find) -> None:
    import torch

    from mst.request import TrainRequest
    from mst.training.adapters import load_model, lora_config, prepare_model, trained_parameters

    model = load_model(vision_model("llava"), "float32", "sdpa", torch.device("cpu"))
    tower = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    request = TrainRequest(target_modules=("q_proj", "v_proj"))
    model = prepare_model(model, lora_config(request))
    trained = [name for name, _ in trained_parameters(model)]

    assert any("vision_tower" in name for name in tower)
    # Two layers with two modules of two factors each.
    assert len(trained) == 8
    assert all("language_model" in name for name in trained)
