"""The reference table: published model shapes on hardware that people have."""

from __future__ import annotations

from tests.reference_models import LLAMA_2_7B, LLAMA_2_13B, LLAMA_3_70B, QWEN_2_5_32B

from mst.errors import PlanError
from mst.hardware import read_hardware
from mst.model.facts import ModelFacts
from mst.plan import Plan
from mst.planner import plan
from mst.registry import load
from mst.request import TrainRequest
from mst.workload import DataFacts

MODELS = (LLAMA_2_7B, LLAMA_2_13B, QWEN_2_5_32B, LLAMA_3_70B)
HARDWARE = (
    "rtx-3090", "rtx-3090:2", "a100-40gb", "a100-80gb", "a100-80gb:4", "a100-80gb:8", "910a:8",
    "910b2:8", "h200", "cpu-16c-64gb",
)  # fmt: skip
LENGTH = 2048


def rows(length: int = LENGTH, count: int = 1000) -> DataFacts:
    """Return `count` rows of `length` tokens, of which a third carry loss."""
    return DataFacts((length,) * count, (length // 3,) * count, 0, None, length, length, 0)


def planned(
    model: ModelFacts, on: str, request: TrainRequest | None = None, data: DataFacts | None = None
) -> Plan:
    """Return the plan for hardware that is named.

    Raises:
        PlanError: nothing fits.
    """
    found = read_hardware(on, load())
    return plan(
        found.backend,
        found.devices,
        found.capabilities,
        {},
        model,
        data or rows(),
        request or TrainRequest(),
        found.host_bytes,
    )


def _cell(model: ModelFacts, on: str) -> str:
    try:
        made = planned(model, on)
    except PlanError:
        return "-"
    tuner = "QLoRA" if made.tuner == "qlora" else {"lora": "LoRA", "full": "full"}[made.tuner]
    how = {"single": ""}.get(made.strategy, f" {made.strategy.upper()}")
    switch = ", checkpointing" if made.gradient_checkpointing else ""
    if made.checkpointed_layers is not None:
        switch += f" {made.checkpointed_layers} of {model.layers}"
    peak = made.memory.peak_bytes / 2**30
    hours = ""
    if made.time is not None:
        hours = f", {made.time.total_seconds / 3600:.1f} h"
    return f"{tuner}{how}{switch}: {peak:.0f} GiB{hours}"


def table() -> str:
    """Return the table as Markdown: memory of one device, and hours for three epochs."""
    head = "| hardware | " + " | ".join(each.path for each in MODELS) + " |\n"
    rule = "|---" * (len(MODELS) + 1) + "|\n"
    lines = [
        f"| `{on}` | " + " | ".join(_cell(model, on) for model in MODELS) + " |\n"
        for on in HARDWARE
    ]
    return head + rule + "".join(lines)
