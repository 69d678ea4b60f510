"""Liger's kernels are used where a model learns the same with them, and leave no trace elsewhere.

What the library does is shown by benchmarks/liger_kernels.py, which needs Triton; here stand-ins
fail as a version of it might.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mst.request import TrainRequest
from mst.training.adapters import lora_config, prepare_model
from mst.training.batches import Layout
from mst.training.liger import fuse_layers
from mst.training.output_head import HeadForm

HEAD = """
from types import MethodType
from transformers.models.llama import modeling_llama

def patched(model, forward):
    modeling_llama.rotate_half = lambda x: x
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(forward, layer.mlp)
        layer.mlp.liger = True
"""
RIGHT = """
def forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
    assert not cross_entropy and not fused_linear_cross_entropy
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(forward, layer.mlp)
        layer.mlp.liger = True
"""
WRONG = """
def apply(cross_entropy=False, fused_linear_cross_entropy=True, model=None):
    patched(model, lambda self, x: 1.01 * self.down_proj(self.gate_proj(x) * self.up_proj(x)))
"""
BROKEN = """
def apply(fused_linear_cross_entropy=True, model=None):
    def forward(self, x):
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid\\nsecond\\nthird")
    patched(model, forward)
"""
CODE = "liger_kernel.transformers.monkey_patch"
KNOWN = '\nMODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}\n'


def library(place: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package of Liger's name first on the path."""
    package = place / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "monkey_patch.py").write_text(HEAD + code + KNOWN)
    monkeypatch.syspath_prepend(place)
    for name in (
        "liger_kernel",
        "liger_kernel.transformers",
        "liger_kernel.transformers.monkey_patch",
    ):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")


def tiny(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    config = configs.for_model(
        kind, vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return prepare_model(models.from_config(config), lora_config(TrainRequest(lora_rank=2)))


def fused(model: Any, cache: Path, layout: Layout = "lines") -> str:
    device = torch.device("cpu")
    return fuse_layers(model, device, torch.float32, layout, HeadForm(), False, cache)


# FlashAttention keeps rows apart in a tensor of one line only.
@pytest.mark.parametrize(("layout", "lines"), [("line", 1), ("padded", 2)])
def test_a_model_that_learns_the_same_keeps_them_and_its_own_loss(
    layout: Layout, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path / "site", RIGHT, monkeypatch)
    model, read = tiny("llama"), set()
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.add(len(inputs[0]))
    )

    assert fused(model, tmp_path / "cache", layout) == ""
    assert read == {lines}
    assert all(each.mlp.liger for each in model.get_base_model().model.layers)
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (WRONG, "its gradients differ by "),
        (BROKEN, "RuntimeError: Triton Error [CUDA]: device kernel image is invalid second"),
    ],
)
def test_kernels_that_learn_otherwise_or_fail_are_taken_out_again(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    library(tmp_path / "site", code, monkeypatch)
    model, rotate = tiny("llama"), modeling_llama.rotate_half
    ids = torch.arange(1, 20)[None]
    before = model(input_ids=ids).logits

    assert says in fused(model, tmp_path / "cache")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert modeling_llama.rotate_half is rotate
    assert not any(hasattr(each.mlp, "liger") for each in model.get_base_model().model.layers)
    assert all(each.grad is None for each in model.parameters())


def test_a_missing_library_and_an_unknown_architecture_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path / "site", RIGHT, monkeypatch)

    assert fused(tiny("gpt_neox"), tmp_path) == "liger-kernel has none for gpt_neox"

    (tmp_path / "site/liger_kernel/transformers/monkey_patch.py").write_text("import no_triton")
    monkeypatch.delitem(sys.modules, CODE)

    assert fused(tiny("llama"), tmp_path) == "No module named 'no_triton'"
