"""The export target `gguf`: one file for llama.cpp and what is built on it, by its own tools.

Read back by transformers for the comparison, and loaded by llama.cpp itself.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import PlanError
from mst.export import Bounds, ExportPlan, ExportReport, ExportRequest
from mst.hookspecs import hookimpl
from mst.model.facts import ModelFacts, read_facts
from mst.model.files import read_config
from mst.plan import Reason
from mst_plugins import gguf_job
from mst_plugins.quantized_model import copy_side_files
from mst_plugins.silence import silence

if TYPE_CHECKING:
    import torch

# Bits to llama.cpp's name and to bytes of a weight; K_M keeps some layers in six bits.
KINDS = {4: "Q4_K_M", 8: "Q8_0", 16: "F16"}
_BYTES = {"Q4_K_M": 0.75, "Q8_0": 1.0625, "F16": 2.0}
# Weights of a row that k-quants pack together; a row that they don't divide gets other blocks.
_SUPER_BLOCK = 256
# What SmolLM2-135M had, and about half as much again (benchmarks/export_quality.py).
BOUNDS = {
    "Q4_K_M": Bounds(perplexity_ratio=1.10, mean_kl=0.10, agreement=0.85, weight_error=0.12),
    "Q8_0": Bounds(perplexity_ratio=1.02, mean_kl=0.02, agreement=0.95, weight_error=0.012),
    # The merge's bfloat16 is 0.00166 of a weight off what was trained; float16 adds nothing to it.
    "F16": Bounds(perplexity_ratio=1.01, mean_kl=0.001, agreement=0.99, weight_error=0.0025),
}
# `model_type` of those that transformers 5.23 reads as they were (tests/plugins/test_gguf.py); of
# Falcon it reads other weights, and Gemma and Phi-3 are written with a tokenizer.model alone.
ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3", "stablelm", "starcoder2", "bloom"})
# Architectures that GGUF knows under another's name.
_WRITTEN_AS = {"mistral": "llama"}
_KIND = ("model_type", "architectures")
# llama.cpp computes the products of quantized weights in 8 bits: a likeliest token that hardly led
# may fall behind.
_ENGINE_SLACK = 0.1


@hookimpl
def mst_export_name() -> str:
    """Return "gguf"."""
    return "gguf"


@hookimpl
def mst_export_check(request: ExportRequest) -> ExportPlan:
    """Return the plan.

    Raises:
        PlanError: llama.cpp's tools are missing, or bits, group size or method are not theirs.
    """
    kind = _kind(request)
    model = Path(request.model_dir)
    found = read_config(model).get("model_type")
    if found not in ARCHITECTURES:
        raise PlanError(
            f"--format gguf was asked for; transformers reads GGUF files of"
            f" {', '.join(sorted(ARCHITECTURES))} back, so that they can be compared, and this"
            f" model is {found!r}. Export it with --format merged."
        )
    if importlib.util.find_spec("gguf") is None:
        raise PlanError("--format gguf needs the package gguf. Run: python -m pip install gguf")
    gguf_job.check()
    facts = read_facts(model)
    return ExportPlan(
        scheme=f"llama.cpp's {kind}",
        bounds=BOUNDS[kind],
        disk_bytes=int(_BYTES[kind] * facts.parameters),
        # What is compared, twice, and what is read back.
        memory_bytes=12 * facts.parameters,
        reasons=_reasons(request, kind, facts),
        serve=(f"llama-server -m {{path}}/{_file(kind)}",),
        # The file that is quantized.
        work_bytes=4 * facts.parameters if kind == "Q4_K_M" else 0,
    )


def _kind(request: ExportRequest) -> str:
    bits = 4 if request.bits is None else request.bits
    if bits not in KINDS:
        known = ", ".join(f"{each} ({kind})" for each, kind in KINDS.items())
        raise PlanError(f"--bits {bits} was asked for; gguf has {known}. Pass one of these.")
    if request.group_size is not None:
        raise PlanError(
            f"--group-size {request.group_size} was asked for; llama.cpp's formats have groups of"
            " their own. Leave it out."
        )
    if request.method not in ("auto", "rtn"):
        raise PlanError(
            f"--method {request.method} was asked for; llama.cpp's formats round, without rows to"
            " calibrate by. Leave it out, or pass --format gptq or awq."
        )
    return KINDS[bits]


def _reasons(request: ExportRequest, kind: str, facts: ModelFacts) -> tuple[Reason, ...]:
    found = []
    if request.bits is None:
        found.append(Reason("bits", "4", "as most GGUF files are; --bits has 8 and 16"))
    odd = [each for each in facts.linears if each.in_features % _SUPER_BLOCK]
    if kind == "Q4_K_M" and odd:
        why = (
            f"their widths are no multiples of {_SUPER_BLOCK}; llama.cpp gives them more bits in"
            " blocks of 32"
        )
        found.append(Reason("layers not in 4 bits", f"{len(odd)} of {len(facts.linears)}", why))
    return tuple(found)


def _file(kind: str) -> str:
    return f"model-{kind}.gguf"


@hookimpl
def mst_export(request: ExportRequest) -> ExportReport:
    """Write the file, and beside it what transformers needs to read it."""
    kind = _kind(request)
    source, directory = Path(request.model_dir), Path(request.output_dir)
    report = gguf_job.write(
        source,
        directory / _file(kind),
        Path(request.work_dir),
        kind,
        request.threads,
        BOUNDS[kind].agreement - _ENGINE_SLACK,
        request.environ,
    )
    shutil.copyfile(source / "config.json", directory / "config.json")
    copy_side_files(source, directory)
    files = tuple(sorted(each.name for each in directory.iterdir()))
    return ExportReport("gguf", files, report.versions, report.checked)


@hookimpl
def mst_export_weights(directory: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights as transformers reads them from the file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (file,) = Path(directory).glob("*.gguf")
    # Its own: what transformers makes of the file's metadata lacks, for one, Qwen3's head_dim.
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if config.model_type in _WRITTEN_AS:
        own = {name: value for name, value in config.to_dict().items() if name not in _KIND}
        config = AutoConfig.for_model(_WRITTEN_AS[config.model_type], **own)
    with silence():  # a bar of its own
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            gguf_file=file.name,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    yield from model.named_parameters()
