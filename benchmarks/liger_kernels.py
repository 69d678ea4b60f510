"""Does a model learn the same with Liger's kernels? Gradients of small random models, in float32.

    python -m benchmarks.liger_kernels [--only llama …]

One JSON line an architecture, with adapters and with all weights: what `fuse_layers` says, "" where
it used the kernels, how many modules then run on them, and the largest difference of a loss and of
a gradient from the plain model's. On a machine with an NVIDIA card the kernels run on it. On any
other, with `pip install --no-deps liger-kernel triton`, in Triton's interpreter, which takes
seconds a pass; for it, arguments of type float are made tensors, as Triton's compiler makes them,
and CUDA's functions for reciprocal square roots and tanh are made of Triton's own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path
from typing import Any

from mst.liger_choice import VERIFIED

SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


def interpret() -> None:
    """Let Triton's interpreter run Liger's kernels (3.9 and 0.8.5 don't by themselves)."""
    import numpy as np

    language: Any = importlib.import_module("triton.language")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    theirs = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return theirs(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), language.float32)
        return language.tensor(handle, language.float32)

    interpreter._implicit_cvt = converted
    norms: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    norms.rsqrt = lambda value: language.rsqrt(value)
    gelu: Any = importlib.import_module("liger_kernel.ops.geglu")
    gelu.tanh = lambda value: 2 * language.sigmoid(2 * value) - 1


def learned(model: Any, device: Any) -> tuple[float, list[Any]]:
    """Return the loss and the gradients of two rows."""
    from mst.data.encode import Example
    from mst.data.rows import Row
    from mst.training.batches import collate_lines
    from mst.training.loss import summed_loss
    from mst.training.output_head import HeadForm

    rows = []
    for stride, length in ((7, 20), (5, 13)):
        ids = array("i", [stride * place % 250 + 1 for place in range(length)])
        rows.append([Example(ids, ids, Row((), "memory", 1))])
    model.zero_grad()
    loss: Any = summed_loss(model, collate_lines(rows, 0, "lines").to(device), HeadForm())
    loss.backward()
    found = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    return float(loss.detach()), found


def compared(kind: str, adapted: bool, device: Any, cache: Path) -> dict[str, Any]:
    """Return the line of one architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mst.request import TrainRequest
    from mst.training.adapters import lora_config, prepare_model
    from mst.training.liger import fuse_layers
    from mst.training.output_head import HeadForm

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    base = models.from_config(configs.for_model(kind, **SHAPE)).to(device)
    model = prepare_model(base, lora_config(TrainRequest(lora_rank=4)) if adapted else None)
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.05)
    loss, plain = learned(model, device)
    reason = fuse_layers(model, device, torch.float32, "lines", HeadForm(), False, cache)
    again, found = learned(model, device)
    liger = [each for each in model.modules() if "liger" in _source(each)]
    return {
        "case": kind,
        "trained": "adapters" if adapted else "all",
        "said": reason,
        "modules": len(liger),
        "loss_difference": abs(again - loss) / abs(loss),
        "gradient_difference": max(
            float((b - a).norm() / a.norm().clamp(min=1e-12))
            for a, b in zip(plain, found, strict=True)
        ),
    }


def _source(module: Any) -> str:
    """Return the package that a module's forward pass is of."""
    return str(getattr(module.forward, "__module__", ""))


def main() -> None:
    """Print a line an architecture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", default=sorted(VERIFIED), metavar="MODEL_TYPE")
    parser.add_argument("--one", choices=("adapters", "all"), help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        interpret()
    if args.one:
        print(json.dumps(compared(args.only[0], args.one == "adapters", device, Path(args.cache))))
        return
    names = ("liger-kernel", "triton", "torch", "transformers")
    versions = {each: importlib.metadata.version(each) for each in names}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "Triton's interpreter"
    with tempfile.TemporaryDirectory() as cache:
        for kind in args.only:
            for trained in ("adapters", "all"):
                # In a process of its own: Liger changes transformers' module for all that follow.
                command = [sys.executable, "-m", "benchmarks.liger_kernels", "--only", kind]
                command += ["--one", trained, "--cache", cache]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                last = (done.stdout.splitlines() or [""])[-1]
                failed = {"case": kind, "failed": done.stderr.strip()[-200:]}
                line = failed if done.returncode else json.loads(last)
                print(json.dumps(line | {"on": where, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
