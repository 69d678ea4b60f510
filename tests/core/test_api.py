"""The public Python API: lazy, complete and not shadowed by a module."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mst


def test_importing_mst_loads_nothing_heavy() -> None:
    code = (
        "import mst, sys; dir(mst); mst.__version__;"
        "print(sorted({'torch', 'transformers', 'peft', 'cattrs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_every_public_name_is_there_and_listed() -> None:
    for name in mst.__all__:
        assert getattr(mst, name) is not None
        assert name in dir(mst)


def test_train_is_the_function_whatever_was_imported_before() -> None:
    for module in ("mst.training.worker", "mst.api", "mst.cli.train", "mst.training"):
        importlib.import_module(module)

    from mst.api import train

    assert mst.train is train


def test_no_module_of_the_package_has_the_name_of_a_public_function() -> None:
    assert mst.__file__ is not None
    modules = {path.stem for path in Path(mst.__file__).parent.iterdir()}

    assert modules & set(mst.__all__) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        _ = mst.tune


def test_own_loop_prepares_trains_and_merges(tiny_model: Path) -> None:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = {name: each.clone() for name, each in base.state_dict().items()}
    model = mst.prepare_model(base, LoraConfig(r=4, target_modules="all-linear"))
    trained = [each for each in model.parameters() if each.requires_grad]
    tokens = torch.arange(3, 19)[None]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        merged = mst.merge_and_unload(model)
        found = merged(input_ids=tokens).logits
    after = merged.state_dict()

    assert all("lora" not in name for name in after)
    assert set(after) == set(before)
    assert not torch.equal(
        after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
