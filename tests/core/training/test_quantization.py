"""Quantized bases and 8-bit optimizers: they train, resume to the same bytes, and stay frozen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mst.errors import ModelError
from mst.model.quantized import quantized_linears
from mst.training import checkpoint
from mst.training.adapters import load_model, lora_config, prepare_model
from mst.training.checkpoint import TrainState
from mst.training.loop import run
from mst.training.quantization import (
    compute_in_float32,
    dequantize,
    dequantized_weight,
    quantized_layers,
)
from mst.training.sealed_directory import remove
from mst.training.session import Session

CPU = torch.device("cpu")
KINDS = ("nf4", "int8")


def load(directory: Path, quantization: str, dtype: str = "float32") -> torch.nn.Module:
    return load_model(directory, dtype, "sdpa", CPU, quantization)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def some_ids(vocabulary: int = 6400) -> torch.Tensor:
    return torch.randint(4, vocabulary, (2, 24), generator=torch.Generator().manual_seed(3))


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what the quantized layers hold, in float32."""
    return {name: dequantized_weight(layer) for name, layer in quantized_layers(model)}


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_head_are_quantized(tiny_model: Path, kind: str) -> None:
    model = load(tiny_model, kind)
    names = {name.rpartition(".")[2] for name, _ in quantized_layers(model)}

    assert len(list(quantized_layers(model))) == 2 * 7
    assert names == {*("qkvo"[i] + "_proj" for i in range(4)), "gate_proj", "up_proj", "down_proj"}
    assert model.lm_head.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert model.model.norm.weight.dtype == torch.float32  # type: ignore[union-attr]


# NF4's widest step is 0.30 of a block's largest weight, so no weight moves by more than 0.16 of
# it (half the step, plus the rounding of the scale); int8's step is 1/127.
@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.16), ("int8", 0.5 / 127 + 1e-3)])
def test_a_quantized_weight_is_near_the_original(tiny_model: Path, kind: str, share: float) -> None:
    original = dict(load_model(tiny_model, "float32", "sdpa", CPU).named_parameters())
    for name, found in held(load(tiny_model, kind)).items():
        weight = original[name + ".weight"]

        assert found.shape == weight.shape
        assert (found - weight).abs().max() <= share * weight.abs().max()
        assert not torch.equal(found, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_the_quantized_weights_as_they_are(tiny_model: Path, kind: str) -> None:
    model = load(tiny_model, kind, "bfloat16")
    before = held(model)
    logits(model, some_ids())

    for name, after in held(model).items():
        assert torch.equal(after, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantized_model_computes_what_the_quantized_one_does(
    tiny_model: Path, kind: str
) -> None:
    model = load(tiny_model, kind, "bfloat16")
    compute_in_float32(model)
    expected = logits(model, some_ids())
    found = logits(dequantize(load(tiny_model, kind, "bfloat16")), some_ids())

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CASES = [
    ("nf4", "float32", False, "adamw_torch"),
    ("nf4", "bfloat16", True, "adamw_8bit"),
    ("nf4", "float16", False, "adamw_torch"),
    ("int8", "float32", True, "adamw_torch"),
    ("int8", "bfloat16", False, "adamw_8bit"),
]


@pytest.mark.parametrize(("kind", "dtype", "checkpointing", "optim"), CASES)
def test_a_resumed_run_ends_with_the_same_bytes(
    begin: Callable[..., Session],
    examples: list[Any],
    tmp_path: Path,
    kind: str,
    dtype: str,
    checkpointing: bool,
    optim: str,
) -> None:
    options: dict[str, Any] = {
        "tuner": "qlora", "quantization": kind, "compute_dtype": dtype, "weights_dtype": dtype,
        "gradient_checkpointing": checkpointing, "optim": optim, "val": examples[:3],
        "lora_rank": 64, "lora_dropout": 0.1, "eval_steps": 2, "save_steps": 3,
    }  # fmt: skip
    whole = begin(**options)
    before = held(whole.model)
    start = {name: each.clone() for name, each in whole.model.named_parameters()}
    state = run(whole, TrainState()).state
    files = {each.name: each.read_bytes() for each in last(tmp_path).iterdir()}
    for path in checkpoint.listed(tmp_path / "checkpoints")[1:]:
        remove(path)
    again = begin(**options)
    found = checkpoint.restore(
        last(tmp_path), again.model, again.optimizer, again.names, again.device
    )
    run(again, found)

    assert found.step < state.step == 8
    assert state.best_loss is not None
    for name, each in whole.model.named_parameters():
        assert each.requires_grad == ("lora_" in name)
        assert not each.requires_grad or each.dtype == torch.float32
        if "lora_B" in name:
            assert not torch.equal(each, start[name]), name
    for name, weight in held(again.model).items():
        assert torch.equal(weight, before[name])
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (last(tmp_path) / name).read_bytes() == files[name]
    assert "base_layer" not in str(adapter_names(last(tmp_path)))


def last(tmp_path: Path) -> Path:
    found = checkpoint.newest_whole(tmp_path / "checkpoints")
    assert found is not None
    return found


def adapter_names(directory: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_adapters_with_dropout_train_in_bfloat16_with_checkpointing(
    begin: Callable[..., Session],
) -> None:
    session = begin(
        compute_dtype="bfloat16", weights_dtype="bfloat16", gradient_checkpointing=True,
        lora_dropout=0.1,
    )  # fmt: skip
    state = run(session, TrainState()).state

    assert state.step == 8


def small(kind: str, **sizes: Any) -> Any:
    """Return a model of random weights whose widths no block of 64 fits."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{"vocab_size": 128, "tie_word_embeddings": False} | sizes)
    untyped: Any = AutoModelForCausalLM
    return untyped.from_config(config)


LLAMA = {
    "hidden_size": 40, "intermediate_size": 71, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {"n_embd": 36, "n_layer": 2, "n_head": 2, "n_positions": 64}
MIXTRAL = LLAMA | {"num_local_experts": 4, "intermediate_size": 48}
FALCON = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False,
}  # fmt: skip
QWEN2 = LLAMA  # with biases
MODELS = [("llama", LLAMA), ("qwen2", QWEN2), ("gpt2", GPT2), ("mixtral", MIXTRAL)]


@pytest.mark.parametrize(("kind", "sizes"), [*MODELS, ("falcon", FALCON)])
def test_the_layers_that_facts_name_are_those_that_get_quantized(
    tmp_path: Path, kind: str, sizes: dict[str, Any]
) -> None:
    from mst.model.structure import describe

    model = small(kind, **sizes)
    model.save_pretrained(tmp_path)
    found = {name for name, _ in quantized_layers(load(tmp_path, "nf4"))}

    assert found == {each.name for each in quantized_linears(describe(model).facts)}
    assert bool(found) == (kind != "falcon")


# PEFT 0.21 says these of every Conv1D, and of every Mixtral, quantized or not.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The following (rank|alpha)_pattern")
@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(("kind", "sizes"), MODELS)
def test_odd_widths_biases_conv1d_and_experts_train_and_merge(
    tmp_path: Path, kind: str, sizes: dict[str, Any], quantization: str
) -> None:
    from mst.request import TrainRequest
    from mst.tuned import TunedModel, load_dequantized
    from mst.tuned import load as load_tuned

    small(kind, **sizes).save_pretrained(tmp_path / "base")
    model: Any = load(tmp_path / "base", quantization)
    torch.manual_seed(0)
    model = prepare_model(model, lora_config(TrainRequest(lora_rank=4)))
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.1)
    ids = some_ids(128)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.save_pretrained(tmp_path / "adapter")
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    source = TunedModel(base, adapter, base, quantization=quantization, weights_dtype="float32")
    tuned = load_tuned(source, "float32", "eager", CPU)
    compute_in_float32(tuned)
    merged: Any = load_dequantized(source, "eager", CPU)
    merged = merged.merge_and_unload()
    expected, found = logits(tuned, ids), logits(merged, ids)
    merged.save_pretrained(tmp_path / "merged")
    again = logits(load_model(tmp_path / "merged", "float32", "eager", CPU), ids)

    assert not lacking
    assert (expected - logits(load(tmp_path / "base", "none"), ids)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_quantized_already_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match="quantized already"):
        load(tmp_path, "nf4")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


FAKE_KERNELS = """
import os
def get_kernel(*names, **options):
    open(os.environ["ASKED"], "a").write("asked the hub")
    raise RuntimeError("no network")
"""
OURS = "from mst.training.quantization import import_bitsandbytes as b; b(); import kernels"


@pytest.mark.slow
def test_bitsandbytes_never_fetches_code_from_a_hub(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(FAKE_KERNELS)
    asked = tmp_path / "asked"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ours = python(OURS, PYTHONPATH=path, ASKED=str(asked))
    silent = not asked.exists()
    theirs = python(
        "from bitsandbytes.functional import has_avx512bf16; print(has_avx512bf16())",
        PYTHONPATH=path, ASKED=str(asked),
    )  # fmt: skip

    assert (ours.returncode, ours.stderr) == (0, "")
    assert silent
    assert theirs.returncode == 0
    # Where the processor makes it ask, this shows that the test above would notice.
    assert asked.exists() == (theirs.stdout.strip() in ("1", "True"))


def test_without_bitsandbytes_the_command_that_installs_it_is_named() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from mst.errors import ModelError\n"
        "from mst.training.quantization import import_bitsandbytes\n"
        "try: import_bitsandbytes()\n"
        "except ModelError as error: print(error)"
    )

    assert "python -m pip install 'mst-train[qlora]'" in python(code).stdout


PEAK = """
import sys, threading, time, torch
from pathlib import Path
from mst.training.adapters import load_model

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def load(directory):
    return load_model(Path(directory), "bfloat16", "sdpa", torch.device("cpu"), "nf4")

def watch():
    while not done:
        seen.append(anonymous())
        time.sleep(0.001)

load(sys.argv[1])
done, seen = [], [anonymous()]
watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
done.append(True)
watcher.join()
print(max(seen) - seen[0])
"""


@pytest.mark.slow
def test_the_whole_model_is_never_in_memory_unquantized(tiny_model: Path, tmp_path: Path) -> None:
    sizes = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    model = small("llama", **sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    whole = sum(each.numel() * 2 for each in model.parameters())
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tiny_model), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    # A quarter is what the 4 bits take; the rest is the widest layer on its way.
    assert int(done.stdout) < 0.6 * whole


@pytest.mark.slow
def test_nf4_learns_as_well_as_lora_within_two_percent() -> None:
    root = Path(__file__).resolve().parents[3]
    # All text carries loss: of the answers alone so little is left that 2 % of it is chance.
    options = (
        "--steps 20 --batch 4 --held-out 16 --threads 1 --train-on all --no-accuracy --no-merged"
    )
    done = subprocess.run(
        [sys.executable, "benchmarks/qlora_quality.py", *options.split(), "--ways", "lora", "nf4"],
        cwd=root, capture_output=True, text=True, timeout=600,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    # Adapters that begin as ever: 1.026.
    assert json.loads(done.stdout.splitlines()[-1])["ratios"]["nf4"]["eval_loss"] <= 1.02
