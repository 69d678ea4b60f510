"""What a process that answers leaves out of memory, and that it is there once it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ANSWERS = """
import sys
from mst.chat import Sampling
from mst.extensions import NOT_FOR_ANSWERS, hide_packages
from mst.generate import generate
from mst.lean_imports import import_lean

hide_packages((), NOT_FOR_ANSWERS)
import_lean()
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([[1, 320, 275, 201]])
print(len(list(generate(model, ids[0].tolist(), (), Sampling(max_new_tokens=4)))))
unused = ("torch._inductor", "torch.distributed.tensor")
print([name for name in unused if name in sys.modules])
stand_in = torch._dynamo
"""
COMPILES = """
print(torch.compile(lambda given: given + 1, backend="eager")(ids).tolist())
"""
IMPORTS = """
from torch._dynamo.utils import counters
import torch._dynamo.utils
print(counters is torch._dynamo.utils.counters)
print(torch._dynamo.utils.__spec__.origin.endswith("utils.py"))
"""
AFTER = """
real = torch._dynamo
print("torch._inductor" in sys.modules, real is not stand_in, stand_in.config is real.config)
"""
USUAL = """
import sys
import torch
import torch._dynamo
from mst.lean_imports import import_lean

before = torch._dynamo, torch.distributed.is_available
import_lean()
print(before == (torch._dynamo, torch.distributed.is_available))
"""

WITHOUT_SYMBOLS = """
import sys
from mst.extensions import NOT_FOR_ANSWERS, hide_packages
from mst.lean_imports import import_lean, without_symbols

hide_packages((), NOT_FOR_ANSWERS)
import_lean()
import torch
from transformers import AutoModelForCausalLM

with without_symbols():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print([name for name in ("sympy", "torch.fx.experimental.symbolic_shapes") if name in sys.modules])
ids = torch.tensor([[1, 320, 275, 201]])
lean = model(ids).logits
print(torch.equal(lean, AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()(ids).logits))
import sympy
print(sympy.Symbol("x") + 1)
"""


def said(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("used", "shown"), [(COMPILES, ["[[2, 321, 276, 202]]"]), (IMPORTS, ["True", "True"])]
)
def test_the_compiler_is_left_out_until_something_of_it_is_used(
    used: str, shown: list[str], tiny_model: Path
) -> None:
    answer, loaded, *after = said(ANSWERS + used + AFTER, str(tiny_model))

    assert answer == "4"
    assert loaded == "[]"
    assert after == [*shown, "True True True"]


def test_what_was_imported_already_is_left_as_it_is() -> None:
    assert said(USUAL) == ["True"]


def test_a_model_is_made_without_what_computes_with_symbols(tiny_model: Path) -> None:
    assert said(WITHOUT_SYMBOLS, str(tiny_model)) == ["[]", "True", "x + 1"]
