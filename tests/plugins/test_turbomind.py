"""What the target turbomind makes of widths and architectures, by LMDeploy's own rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mst.errors import PlanError
from mst.export import ExportRequest
from mst_plugins import turbomind


def model(directory: Path, width: int = 256, **changes: Any) -> Path:
    """Write a Llama with random weights of a width."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    if changes:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def written(source: Path, target: Path) -> Path:
    target.mkdir()
    request = ExportRequest(str(source), str(target), method="rtn")
    report = turbomind.mst_export(request)

    assert report.checked["rules of lmdeploy 0.18.0"] == "fulfilled"
    return target


@pytest.mark.parametrize(
    ("width", "layout", "group"), [(256, "gptq", 128), (96, "compressed-tensors", 32)]
)
def test_groups_of_128_are_gptq_and_other_widths_compressed_tensors(
    tmp_path: Path, width: int, layout: str, group: int
) -> None:
    target = written(model(tmp_path / "model", width), tmp_path / "out")
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    found = config.get("group_size") or config["config_groups"]["group_0"]["weights"]["group_size"]

    assert (config["quant_method"], found) == (layout, group)
    assert turbomind.config_fault(target) == ""


BROKEN: list[tuple[int, dict[str, Any], str]] = [
    (256, {"quant_method": "awq", "version": "gemv"}, "version is 'gemv'"),
    (256, {"desc_act": True}, "desc_act is true"),
    (256, {"sym": False}, "sym is false"),
    (256, {"group_size": 64}, "group_size is 64"),
    (256, {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    (96, {"config_groups": {"group_0": {"weights": {
        "group_size": 32, "num_bits": 4, "type": "int"}}}}, "group_0 is not pack-quantized"),
    (96, {"config_groups": {"group_0": {"format": "pack-quantized", "weights": {
        "group_size": 64, "num_bits": 4, "type": "int"}}}}, "group_size is 64"),
]  # fmt: skip


@pytest.mark.parametrize(("width", "changes", "said"), BROKEN)
def test_a_config_that_turbomind_would_refuse_is_named(
    tmp_path: Path, width: int, changes: dict[str, Any], said: str
) -> None:
    target = written(model(tmp_path / "model", width), tmp_path / "out")
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))

    assert said in turbomind.config_fault(target)


def test_an_architecture_that_turbomind_lacks_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "model", architectures=["PhiForCausalLM"])
    with pytest.raises(PlanError, match="and this one is PhiForCausalLM"):
        turbomind.mst_export_check(ExportRequest(str(source), method="rtn"))


def test_eight_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="TurboMind loads 4"):
        turbomind.mst_export_check(ExportRequest(str(model(tmp_path / "m")), bits=8, method="rtn"))
