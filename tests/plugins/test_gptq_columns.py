"""mst's pass over the columns of a layer loses no more than gptqmodel's own, on a real layer.

Skipped where gptqmodel is not installed: `python -m pip install gptqmodel==7.6.0`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from mst.cache import cache_dir
from mst.demo import demo_data
from mst.model.gguf import convert
from mst.model.locate import default_model

# gptqmodel changes transformers as it is imported, so it has a process of its own.
COMPARE = """
import copy, json, sys
import torch
from pathlib import Path
from gptqmodel.quantization.gptq import GPTQ
from mst.data.encode import encode
from mst.data.formats import read
from mst.data.template import load_template
from mst.data.tokens import load_tokenizer
from mst.training.adapters import load_model
from mst_plugins.gptqmodel_gptq import _is_usual, _quantized
from mst_plugins.gptqmodel_job import QuantizeJob
from mst_plugins.gptqmodel_worker import _config
from mst_plugins.quantized_model import Scheme

source, rows, *layers = Path(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
model = load_model(source, "bfloat16", "sdpa", torch.device("cpu")).eval()
tokenizer = load_tokenizer(source)
examples = encode(read((rows,)).rows, tokenizer, load_template(source, None), None).examples
seen = {layer: [] for layer in layers}
for layer, kept in seen.items():
    linear = model.get_submodule(layer)
    linear.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0][0]))
with torch.inference_mode():
    for each in examples:
        model.model(input_ids=torch.tensor([list(each.input_ids)]), use_cache=False)
config = _config(QuantizeJob("", "", "", Scheme("gptq", 4, 64, True), 1, 0, 0), False)

def lost(layer, read, quantize):
    linear = model.get_submodule(layer)
    task = GPTQ(copy.deepcopy(linear), copy.deepcopy(config))
    task.quantizer.configure(perchannel=True)
    with torch.inference_mode():
        task.add_batch(read[None], None)
        assert _is_usual(task)
        change = quantize(task)[0].double() - linear.weight.double()
        return float((change @ read.double().T).square().sum())

for layer, kept in seen.items():
    read = torch.cat(kept)
    print(json.dumps([len(read), lost(layer, read, _quantized), lost(layer, read, GPTQ.quantize)]))
"""


@pytest.mark.slow
def test_real_layers_lose_no_more_than_by_gptqmodels_own_pass() -> None:
    if not list(importlib.metadata.distributions(name="gptqmodel")):
        pytest.skip("wants gptqmodel 7.6.0")
    source = convert(default_model().path, cache_dir())
    layers = [f"model.layers.12.{each}" for each in ("self_attn.q_proj", "mlp.up_proj")]
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, source, f"{demo_data()[1]}#32", *layers],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TERM": "dumb"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    assert len(found) == len(layers)
    for tokens, own, theirs in found:
        # More tokens than columns, so that the Hessian has full rank.
        assert tokens > 576
        assert 0 < own <= theirs
