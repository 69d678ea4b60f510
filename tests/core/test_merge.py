"""`mst merge`: what it writes equals what it read, and a doubtful merge leaves nothing."""

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

from mst import merge as merging
from mst import rundir, tuned
from mst.data.special import read_json
from mst.errors import ModelError, MstError, RunError
from mst.merge import MergeJob, prepare_merge
from mst.training.checkpoint import is_whole
from mst.tuned import TunedModel, of_run


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run that a test may change."""
    return shutil.copytree(finished_run, tmp_path / "run")


def merge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", "merge", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def tokens() -> Any:
    import torch

    return torch.randint(6400, (4, 32), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=tokens()).logits


def test_a_merged_model_says_what_base_and_adapter_say(merged: Path, finished_run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from mst.tuned import load

    source = load(of_run(finished_run), "float32", "sdpa", torch.device("cpu"))
    base = AutoModelForCausalLM.from_pretrained(of_run(finished_run).weights)
    found = logits(AutoModelForCausalLM.from_pretrained(merged))

    torch.testing.assert_close(found, logits(source), rtol=1e-4, atol=1e-4)
    assert (found - logits(base)).abs().max() > 0.01


def test_a_merged_model_stands_alone(merged: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "hello"}]
    ours = AutoTokenizer.from_pretrained(merged).apply_chat_template(chat, tokenize=False)
    original = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(chat, tokenize=False)

    assert is_whole(merged)
    assert ours == original
    assert not list(merged.glob("adapter*"))
    assert [each.name for each in merged.parent.iterdir()] == ["model"]


def test_the_card_and_the_report_say_where_it_came_from(merged: Path, finished_run: Path) -> None:
    manifest = rundir.read_manifest(finished_run)
    report = json.loads((merged / merging.REPORT).read_text())
    card = (merged / "README.md").read_text()

    assert report["model_sha256"] == manifest.model_sha256
    assert report["step"] == 4
    assert report["dtype"] == "float32"
    assert report["merged"]["argmax_agreement"] >= 0.999
    for known in (manifest.data[0].sha256, manifest.model_sha256, "tiny-llama", "step 4"):
        assert known in card
    assert "rows.jsonl" not in card
    assert "my card" not in card


def test_a_checkpoint_is_merged_in_another_dtype(run: Path) -> None:
    import torch
    from safetensors.torch import load_file

    done = merge(run, "--checkpoint", "2", "--dtype", "bfloat16")
    tensors = load_file(run / "merged" / "model.safetensors")

    assert done.returncode == 0, done.stderr
    assert "step 2, bfloat16" in done.stdout
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert read_json(run / "merged" / "config.json")["dtype"] == "bfloat16"


def test_an_output_that_holds_something_is_kept(run: Path) -> None:
    (run / "merged").mkdir()
    (run / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match=r"not empty \(it holds mine.txt\)"):
        prepare_merge(run)

    assert (run / "merged" / "mine.txt").read_text() == "keep"


def test_the_default_dtype_is_the_base_models(run: Path) -> None:
    assert prepare_merge(run).dtype == "float32"
    assert prepare_merge(run, dtype="float16").dtype == "float16"
    assert prepare_merge(run).output_dir == str(run / "merged")


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_an_unfinished_run_merges_only_by_checkpoint(run: Path, status: str) -> None:
    rundir.update_manifest(run, status=status)
    with pytest.raises(RunError, match=r"no result yet.*--checkpoint last"):
        prepare_merge(run)

    assert prepare_merge(run, which="last").source.step == 4
    assert prepare_merge(run, which="best").source.step in (2, 4)


@pytest.mark.parametrize(
    ("which", "message"),
    [("3", r"step 3 \(found: 2, 4\)"), ("newest", "last, best or a step, not 'newest'")],
)
def test_a_checkpoint_that_is_not_there_names_those_that_are(
    run: Path, which: str, message: str
) -> None:
    with pytest.raises(MstError, match=message):
        prepare_merge(run, which=which)


def test_a_damaged_adapter_is_refused(run: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match="adapter is damaged"):
        prepare_merge(run)


def test_another_base_model_is_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    rundir.update_manifest(run, model_path=str(other))
    with pytest.raises(RunError, match="another model"):
        prepare_merge(run)

    rundir.update_manifest(run, model_path=str(tmp_path / "gone"))
    with pytest.raises(RunError, match="is gone"):
        prepare_merge(run)


def test_a_quantized_base_is_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from mst.model.fingerprint import model_sha256

    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq"}}
    (other / "config.json").write_text(json.dumps(quantized))
    rundir.update_manifest(run, model_path=str(other), model_sha256=model_sha256(other))
    with pytest.raises(ModelError, match="gptq has quantized"):
        prepare_merge(run)


def test_a_disk_that_is_too_small_is_told_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: space)
    with pytest.raises(RunError, match="Free some space"):
        prepare_merge(run)


def test_two_merges_do_not_write_the_same_place(run: Path) -> None:
    job = prepare_merge(run)
    with (
        merging.claimed(Path(job.output_dir).parent),
        pytest.raises(RunError, match="another merge"),
    ):
        merging.merge(job, os.environ)


def test_a_merge_that_disagrees_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mst import merge_worker
    from mst.training.adapters import merge_and_unload

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        merged = merge_and_unload(model)
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return merged

    monkeypatch.setattr(merge_worker, "merge_and_unload", wrong)
    with pytest.raises(ModelError, match="does not agree with its source"):
        merge_worker.work(prepare_merge(run))

    assert sorted(each.name for each in run.glob("*merged*")) == []
    assert list(run.glob(".*.part")) == []


def test_values_that_overflow_float16_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mst import merge_worker

    original = tuned.load

    def large(*arguments: Any) -> torch.nn.Module:
        model = original(*arguments)
        with torch.no_grad():
            # float16 ends at 65504.
            model.get_parameter("base_model.model.model.norm.weight").fill_(1e6)
        return model

    monkeypatch.setattr(merge_worker, "load", large)
    with pytest.raises(ModelError, match="does not agree"):
        merge_worker.work(prepare_merge(run, dtype="float16"))

    assert not (run / "merged").exists()


@pytest.mark.slow
def test_a_whole_model_is_cast_and_keeps_its_tokenizer(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "full"
    done = subprocess.run(
        [
            sys.executable, "-m", "mst", "train", "--model", tiny_model, "--dataset", chat_rows,
            "--output-dir", run, "--tuner", "full", "--max-steps", "2", "--val-size", "0",
            "--label-accuracy", "off", "--threads", "1", "--save-steps", "1", "--device", "cpu",
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for output, extra in (("result", ()), ("first", ("--checkpoint", "1"))):
        done = merge(run, "--output-dir", tmp_path / output, "--dtype", "float16", *extra)

        assert done.returncode == 0, done.stderr
        assert (tmp_path / output / "tokenizer.json").is_file()
        assert "all weights" in (tmp_path / output / "README.md").read_text()


def test_the_stop_tokens_gain_the_templates_end_of_turn(tiny_model: Path, tmp_path: Path) -> None:
    """A base model that stops at the end of a document, with a template that ends turns."""
    from transformers import AutoModelForCausalLM

    from mst.data.template import load_template
    from mst.data.tokens import load_tokenizer
    from mst.merge_worker import _set_stop_tokens, turn_end

    template, tokenizer = load_template(tiny_model), load_tokenizer(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    end = tokenizer.tokenizer.token_to_id("<|im_end|>")
    model.generation_config.eos_token_id = tokenizer.tokenizer.token_to_id("<|endoftext|>")
    _set_stop_tokens(model, template, tokenizer)

    assert turn_end(template, tokenizer) == end
    assert model.generation_config.eos_token_id == [0, end]


def test_a_job_survives_json() -> None:
    from mst import serial

    source = TunedModel("/base", "/adapter", "/base", None, 3)
    job = MergeJob("/run", source, "/out", "bfloat16", "sdpa", 2)

    assert serial.from_json(MergeJob, json.loads(serial.dumps(job))) == job


@pytest.fixture(scope="session")
def qlora_run(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base in NF4: 2 steps and an evaluation."""
    path = tmp_path_factory.mktemp("runs") / "qlora"
    options = {
        "model": tiny_model, "dataset": chat_rows, "output-dir": path, "device": "cpu",
        "max-steps": 2, "per-device-train-batch-size": 8, "gradient-accumulation-steps": 1,
        "val-size": 8, "learning-rate": 0.01, "label-accuracy": "off", "threads": 1,
        "tuner": "qlora",
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "mst", "train", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    return path


def answer(run: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mst", "chat", str(run), "--prompt", "hi", "--max-new-tokens", "8"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.slow
def test_chat_talks_to_a_qlora_run(qlora_run: Path) -> None:
    assert answer(qlora_run)


@pytest.mark.slow
def test_where_no_kernels_are_a_qlora_run_is_loaded_dequantized(qlora_run: Path) -> None:
    import torch

    from mst.training.quantization import compute_in_float32, quantized_layers
    from mst.tuned import load, load_dequantized

    cpu = torch.device("cpu")
    quantized = load(of_run(qlora_run), "float32", "sdpa", cpu)
    compute_in_float32(quantized)
    ordinary = load_dequantized(of_run(qlora_run), "sdpa", cpu)
    half = load_dequantized(of_run(qlora_run), "sdpa", cpu, "bfloat16")

    torch.testing.assert_close(logits(ordinary), logits(quantized), rtol=1e-4, atol=1e-5)
    assert not list(quantized_layers(ordinary))
    dtypes = {name: each.dtype for name, each in half.named_parameters()}
    assert {kind for name, kind in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    assert {kind for name, kind in dtypes.items() if "lora_" in name} == {torch.float32}


@pytest.mark.slow
def test_a_qlora_run_is_merged_into_the_weights_that_it_was_trained_on(
    qlora_run: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from mst.training.quantization import compute_in_float32
    from mst.tuned import load

    done = merge(qlora_run, "--output-dir", tmp_path / "merged", "--dtype", "float32")

    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    source = load(of_run(qlora_run), "float32", "sdpa", torch.device("cpu"))
    compute_in_float32(source)
    other = replace(of_run(qlora_run), quantization="none")
    unquantized = load(other, "float32", "sdpa", torch.device("cpu"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    report = json.loads((tmp_path / "merged" / merging.REPORT).read_text())

    torch.testing.assert_close(found, logits(source), rtol=1e-4, atol=1e-4)
    assert (found - logits(unquantized)).abs().max() > 0.01
    assert report["base"] == "nf4"
    assert "QLoRA" in (tmp_path / "merged" / "README.md").read_text()
