"""GPTQ and AWQ by gptqmodel itself: real layouts, gone on with after a kill, no row in the clear.

Skipped where gptqmodel is not installed: `python -m pip install gptqmodel==7.6.0`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mst.errors import PlanError
from mst.model.facts import LinearShape
from mst_plugins.gptqmodel_job import (
    PASS_TOKENS,
    VERSION,
    check,
    rows_a_pass,
    rows_of_one_pass,
)
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.layouts.rounding import dequantize
from mst_plugins.quantized_model import Scheme, decoder_linears, faults

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).resolve().parents[1] / "data"
needs_gptqmodel = pytest.mark.skipif(
    not list(importlib.metadata.distributions(name="gptqmodel")), reason="wants gptqmodel 7.6.0"
)
SCHEMES = {"gptq": Scheme("gptq", 4, 32, True), "awq": Scheme("awq", 4, 32, False)}
# The calling process, so that it can be killed with its worker.
CALL = """
import json, os, sys
from pathlib import Path
from mst_plugins.gptqmodel_job import quantize
from mst_plugins.quantized_model import Scheme

source, directory, work, rows, scheme = sys.argv[1:]
quantize(
    Path(source), Path(directory), Path(work), Scheme(*json.loads(scheme)), json.loads(rows), 1,
    os.environ, lambda progress: print(progress.layer, progress.layers, flush=True),
)
"""


def test_a_pass_takes_short_rows_together_and_a_long_one_alone() -> None:
    assert rows_a_pass([[1] * 40, [1] * 64]) == PASS_TOKENS // 64
    assert rows_a_pass([[1], [1] * 2000]) == 1


def test_awq_has_one_pass_with_little_padding() -> None:
    rows = [[place] * length for place, length in enumerate([9, 60, 2000, 55, 10, *[58] * 40])]
    found = rows_of_one_pass(rows)

    assert len(found) * max(map(len, found)) <= PASS_TOKENS
    assert sum(map(len, found)) > 0.9 * PASS_TOKENS
    assert all(each in [row[:PASS_TOKENS] for row in rows] for each in found)
    assert rows_of_one_pass([[7] * 3, [8] * 9000]) == [[8] * PASS_TOKENS]
    assert sorted(map(len, rows_of_one_pass([[1] * 20, [2] * 30, [3] * 25]))) == [20, 25, 30]


def test_what_gptqmodel_cannot_do_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = [LinearShape("k_proj", 32, 64)]
    monkeypatch.setattr("importlib.metadata.version", lambda name: VERSION)
    check(layers, SCHEMES["gptq"])

    with pytest.raises(PlanError, match=r"k_proj has 32 outputs.*64"):
        check(layers, SCHEMES["awq"])
    monkeypatch.setattr("importlib.metadata.version", lambda name: "7.7.0")
    with pytest.raises(PlanError, match=r"found: 7.7.0.*--method rtn"):
        check(layers, SCHEMES["gptq"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers wide enough for AWQ, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tokenizers/minimind" / each, path)
    return path


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    """Random rows: what a row says makes no difference here, but that they differ in length."""
    generator = random.Random(0)
    lengths = [60, *(generator.randrange(30, 60) for _ in range(29))]
    return [[generator.randrange(3, 6400) for _ in range(length)] for length in lengths]


def call(
    source: Path, directory: Path, work: Path, rows: list[list[int]], scheme: Scheme
) -> subprocess.Popen[str]:
    """Start a quantization in a process of its own."""
    directory.mkdir(exist_ok=True)
    values = [scheme.layout, scheme.bits, scheme.group_size, scheme.symmetric]
    arguments = (source, directory, work, json.dumps(rows), json.dumps(values))
    return subprocess.Popen(
        [sys.executable, "-c", CALL, *map(str, arguments)],
        # The jail that workers run in lets them write under it.
        cwd=work.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and theirs."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, found) for each in (child, *children(child))]


def layer_error(source: Path, quantized: Path, scheme: Scheme) -> dict[str, float]:
    """Return how far each layer's weight is from the source's, relative to its size."""
    before, after = tensors(source), tensors(quantized)
    found = {}
    for each in decoder_linears(source):
        prefix = f"{each.name}."
        part = {name.removeprefix(prefix): after[name] for name in after if prefix in name}
        weight = before[f"{each.name}.weight"].float()
        again = dequantize(LAYOUTS[scheme.layout].unpack(part, scheme.bits))
        found[each.name] = float((again - weight).norm() / weight.norm())
    return found


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@needs_gptqmodel
@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_a_killed_run_goes_on_to_the_very_bytes_and_keeps_no_row_in_the_clear(
    name: str, model: Path, tmp_path: Path, rows: list[list[int]]
) -> None:
    scheme = SCHEMES[name]
    whole = call(model, tmp_path / "whole", tmp_path / "work-1", rows, scheme)
    said, wrong = whole.communicate(timeout=300)

    assert (whole.returncode, wrong, said.split()) == (0, "", ["1", "2", "2", "2"])

    killed = call(model, tmp_path / "again", tmp_path / "work-2", rows, scheme)
    kept = tmp_path / "work-2"
    deadline = time.monotonic() + 300
    while not list(kept.glob("*/CURRENT")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for each in (*children(killed.pid), killed.pid):
        os.kill(each, 9)
    killed.communicate(timeout=60)
    files = [path for path in kept.rglob("*") if path.is_file()]

    assert list(kept.glob("*/CURRENT"))
    assert not list((tmp_path / "again").iterdir())
    assert_no_activations(model, rows, files)

    again = call(model, tmp_path / "again", kept, rows, scheme)
    said, wrong = again.communicate(timeout=300)

    assert (again.returncode, wrong, said.split()) == (0, "", ["2", "2"])
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert faults(tmp_path / "again", decoder_linears(model), scheme) == []
    assert max(layer_error(model, tmp_path / "again", scheme).values()) < 0.2


def assert_no_activations(source: Path, rows: list[list[int]], files: list[Path]) -> None:
    """Look for what the first layer was given: the embeddings of two tokens of a row in a row."""
    import torch

    table: Any = tensors(source)["model.embed_tokens.weight"]
    first = table[rows[0][:2]]

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        needle = first.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        assert not any(needle in path.read_bytes() for path in files), dtype
    ids = json.dumps(rows[0][:8])[1:-1].encode()
    assert not any(ids in path.read_bytes() for path in files)
