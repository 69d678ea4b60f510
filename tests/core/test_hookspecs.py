"""The vendor's manual: its examples run, and no hook is documented in part."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pluggy
import pytest

from mst import hookspecs
from mst.data.rows import Row
from mst.errors import PlanError
from mst.export import ExportPlan, ExportRequest
from mst.facts import Capabilities, DeviceFacts, Probe, Telemetry
from mst.objective import Micro, Objective, Scored
from mst.registry import OPTIONAL_HOOKS, REQUIRED_HOOKS, load
from mst.request import TrainRequest
from mst.serve.engines import (
    EngineCommand,
    EngineEnvironment,
    EngineFacts,
    EngineStart,
    ModelToServe,
)
from mst.serve.engines.choose import FoundEngine, choose_engine

GIB = 2**30
DEVICE = DeviceFacts("mychip", 3, "MyChip 1", "mc1", 16 * GIB, 4 * GIB, ("bfloat16",))
START = EngineStart(
    ModelToServe("/m", "merged"), "wards", "cpu", "float32", 512, 8, 2, "/e", socket="/s"
)
SPECS = {
    name: function
    for name, function in vars(hookspecs).items()
    if name.startswith("mst_") and inspect.isfunction(function)
}
# What each example answers; those that do something have a test of their own.
ANSWERS: dict[str, tuple[dict[str, object], object]] = {
    "mst_backend_name": ({}, "mychip"),
    "mst_probe": (
        {},
        Probe(found=False, usable=False, reason="no /dev/mychip*: load the driver"),
    ),
    "mst_capabilities": (
        {"device": DEVICE},
        Capabilities(
            "mychip",
            "myccl",
            ("single", "ddp"),
            attention=("sdpa", "eager"),
            visible_devices_env="MYCHIP_VISIBLE_DEVICES",
        ),
    ),
    "mst_health": (
        {"device": DEVICE},
        ["another process holds half of MyChip 1: see `mychip-smi`"],
    ),
    "mst_telemetry": (
        {"device": DEVICE},
        Telemetry(reason="/sys/class/mychip/mychip3/energy_uj is not there: it needs driver 2.1"),
    ),
    "mst_environment": (
        {"devices": [DEVICE]},
        {"MYCHIP_VISIBLE_DEVICES": "3", "MYCHIP_LOG_LEVEL": "error"},
    ),
    "mst_export_name": ({}, "myformat"),
    "mst_objective_name": ({}, "confident"),
    "mst_engine_name": ({}, "myengine"),
    "mst_engine_environment": (
        {"directory": "/nowhere/e", "backend": "cpu"},
        EngineEnvironment(
            "python3 -m venv /nowhere/e && /nowhere/e/bin/python -m pip install myengine==2.1"
        ),
    ),
    "mst_engine_command": (
        {"start": START},
        EngineCommand(
            ("/e/bin/myengine", "/m", "--uds", "/s", "--name", "wards", "--log", "none"),
            {"MYENGINE_THREADS": "2"},
        ),
    ),
}
ACTING = {
    "mst_activate", "mst_export", "mst_export_check", "mst_export_rounded", "mst_export_weights",
    "mst_objective", "mst_engine_facts", "mst_engine_fault",
}  # fmt: skip


def example(name: str) -> str:
    """Return the code of a specification's example."""
    blocks = re.findall(r"```python\n(.*?)```", inspect.getdoc(SPECS[name]) or "", re.DOTALL)
    assert len(blocks) == 1
    return textwrap.dedent(blocks[0])


def plugin(*names: str) -> types.ModuleType:
    """Return a module made of the examples of these specifications."""
    module = types.ModuleType("mychip")
    for name in names:
        exec(example(name), vars(module))
    return module


def relay(name: str) -> pluggy.HookRelay:
    """Register one example, which checks its signature, and return its hooks."""
    manager = pluggy.PluginManager("mst")
    manager.add_hookspecs(hookspecs)
    module = plugin(name)
    manager.register(module)
    registered = [caller.name for caller in manager.get_hookcallers(module) or ()]
    assert registered == [name]
    return manager.hook


def test_every_specification_is_required_or_optional() -> None:
    known = [*REQUIRED_HOOKS.values(), *OPTIONAL_HOOKS.values()]

    assert sorted(SPECS) == sorted(name for names in known for name in names)
    assert set(ANSWERS) | ACTING == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_a_specification_tells_all_that_a_vendor_needs(name: str) -> None:
    text = inspect.getdoc(SPECS[name]) or ""
    first = text.splitlines()[0]
    sections = re.findall(r"^(Called|Args|Returns|If it raises|Example):$", text, re.MULTILINE)
    arguments = list(inspect.signature(SPECS[name]).parameters)

    assert first.endswith(".")
    assert sections == [
        "Called",
        *(["Args"] if arguments else []),
        "Returns",
        "If it raises",
        "Example",
    ]
    assert all(f"    {argument}: " in text for argument in arguments)
    assert text.endswith("Added in 0.1.0.")
    assert len(example(name).splitlines()) <= 24


@pytest.mark.parametrize("name", ANSWERS)
def test_an_example_answers_what_it_says(name: str) -> None:
    arguments, answer = ANSWERS[name]

    assert getattr(relay(name), name)(**arguments) == answer


def test_the_probe_example_finds_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(2):
        (tmp_path / f"mychip{index}").touch()
    module: Any = plugin("mst_probe")
    monkeypatch.setattr(module, "Path", lambda _: tmp_path)

    probe = module.mst_probe()

    assert probe.usable
    assert [device.index for device in probe.devices] == [0, 1]


def test_the_capabilities_example_depends_on_the_device() -> None:
    older = DeviceFacts("mychip", 0, "MyChip 0", "mc0", None, None, ("float32",))

    assert relay("mst_capabilities").mst_capabilities(device=older).attention == ("eager",)


def test_the_activation_example_imports_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="torch_mychip"):
        relay("mst_activate").mst_activate()

    monkeypatch.setitem(sys.modules, "torch_mychip", types.ModuleType("torch_mychip"))

    assert relay("mst_activate").mst_activate() is None


def test_the_export_examples_write_a_copy_and_read_it_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    request = ExportRequest(str(tiny_model), str(tmp_path))
    made = relay("mst_export_check").mst_export_check(request=request)
    report = relay("mst_export").mst_export(request=request)
    weights = dict(relay("mst_export_weights").mst_export_weights(directory=str(tmp_path)))
    rounded = dict(relay("mst_export_rounded").mst_export_rounded(request=request))

    assert isinstance(made, ExportPlan)
    assert made.disk_bytes == 4 * sum(each.numel() for each in weights.values())
    assert (report.format, "model.safetensors" in report.files) == ("myformat", True)
    assert weights.keys() == rounded.keys()
    assert all(float((weights[name] - rounded[name]).abs().max()) <= 1 / 16 for name in weights)
    assert not all(torch.equal(weights[name], rounded[name]) for name in weights)


def test_the_export_example_refuses_bits_that_it_has_not(tiny_model: Path) -> None:
    with pytest.raises(PlanError, match="--bits 4: myformat has float32 only"):
        relay("mst_export_check").mst_export_check(request=ExportRequest(str(tiny_model), bits=4))


def test_the_objective_example_cares_less_for_what_is_unlikely() -> None:
    import torch

    objective = relay("mst_objective").mst_objective(request=TrainRequest())
    log_probs = torch.tensor([[-0.1, -3.0]], requires_grad=True)
    scored = Scored(log_probs, torch.ones(1, 2), torch.tensor([2.0]))
    part = objective.loss(Micro((), scored, None, {"tokens": 2.0}))
    part.loss.backward()

    assert isinstance(objective, Objective)
    assert objective.lacks(Row((), "rows.txt", 1, text="a")) != ""
    assert log_probs.grad is not None
    likely, unlikely = log_probs.grad[0].tolist()
    assert likely < 5 * unlikely < 0


def test_the_engine_examples_lead_to_a_choice(tmp_path: Path) -> None:
    facts = relay("mst_engine_facts").mst_engine_facts()
    here = EngineEnvironment("make it", "2.1")
    llama = ModelToServe(str(tmp_path), "awq", "LlamaForCausalLM")

    assert isinstance(facts, EngineFacts)
    assert choose_engine(llama, "mychip", [FoundEngine("m", facts, here)]).engine == "m"
    with pytest.raises(PlanError, match="not on cpu"):
        choose_engine(llama, "cpu", [FoundEngine("m", facts, here)])


def test_the_fault_example_reads_the_group_size(tmp_path: Path) -> None:
    hook = relay("mst_engine_fault").mst_engine_fault
    gptq = ModelToServe(str(tmp_path), "gptq")
    config = tmp_path / "config.json"

    config.write_text('{"quantization_config": {"group_size": 32}}')
    assert "these are of 32" in hook(model=gptq, backend="cpu")
    config.write_text('{"quantization_config": {"group_size": 128}}')
    assert hook(model=gptq, backend="cpu") == ""
    assert hook(model=ModelToServe(str(tmp_path), "merged"), backend="cpu") == ""


def test_the_examples_together_are_one_whole_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mst_mychip_examples", plugin(*SPECS))

    registry = load([EntryPoint("mychip", "mst_mychip_examples", "mst")])

    (record,) = registry.records
    assert (record.status, record.reason) == ("ok", "")
    assert record.kinds == ("backend", "export", "objective", "engine")
    assert record.hooks == tuple(sorted(SPECS))
    assert list(registry.backends) == ["mychip"]
    assert list(registry.exports) == ["myformat"]
    assert list(registry.objectives) == ["confident"]
    assert list(registry.engines) == ["myengine"]
