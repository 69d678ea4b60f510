"""The memory forecast and the trace beside measured peaks, over models, methods, batches, dtypes.

From the root of the repository: `python -m benchmarks.memory_forecast [--output FILE] [CASE …]`
trains each case for a few steps in a process of its own, through mst's own loop: on the CPU, where
the resident set is measured from before the model was loaded, and on the simulated chip, where
torch's allocator counts. Weights are random. One JSON line a case, then one a device with the
errors. Cases that FILE already has are not run again; forecasts are always made anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.simulated import GIB, simchip_environment

from benchmarks.memory_cases import (
    SHAPES,
    Case,
    cases,
    offloaded,
    short_rows,
    some_layers,
    step_shape,
    write_model,
)
from mst.extensions import hide_packages
from mst.launch import worker_environment
from mst.memory import forecast
from mst.memory.runtime import heap_environment
from mst.memory_trace import trace, why_not
from mst.model.facts import ModelFacts, read_facts
from mst.plan import MemoryForecast
from mst.serial import from_json, to_json
from mst.training.batches import Layout, layout_of

if TYPE_CHECKING:
    from mst.data.encode import Example
    from mst.plan import Plan
    from mst.request import TrainRequest

# A CPU's heap grows over the first ones: SmolLM2's by 2 % from the third to the twelfth. The chip's
# allocator counts tensors, and the optimizer's are all there after the first.
STEPS = {"cpu": 12, "simchip": 3}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(directory: Path, case: Case) -> dict[str, Any]:
    """Train the case in this process; return its peak and what there was before the model."""
    import torch

    from mst.request import TrainRequest
    from mst.training import loop
    from mst.training.checkpoint import TrainState
    from mst.training.device_memory import peak_bytes, reset_peak
    from mst.training.report import Reporters
    from mst.training.session import make_session

    if case.device != "cpu":
        from mst.probe import activate
        from mst.registry import load

        activate(load(), case.device)
    import peft  # noqa: F401 -- a library, and not what is measured
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    made = case.configuration
    device = torch.device("cpu" if case.device == "cpu" else f"{case.device}:0")
    before = _resident()
    request = TrainRequest(lora_rank=made.lora_rank, target_modules=made.target_modules)
    model = _prepared(directory, case, device, request)
    rows = _rows(case)
    plan = _plan(case, device, len(rows))
    layout = layout_of(case.packing, plan.attention, made.compiled)
    if made.compiled and (reason := _compile(model, device, plan, request, rows, layout)):
        raise RuntimeError(reason)
    losses: list[float] = []

    class Losses(Reporters):
        def step(self, metrics: Any) -> None:
            losses.append(metrics.loss)

    with tempfile.TemporaryDirectory() as checkpoints:
        session = make_session(
            model, device, plan, request, packing=case.packing, train=rows, pad_token_id=0,
            checkpoints=Path(checkpoints), reporter=Losses(), stop_asked=lambda: False,
            layout=layout,
        )  # fmt: skip
        reset_peak(device)
        loop.run(session, TrainState())
        peak = peak_bytes(device)
    return {
        "measured_bytes": peak - (before if case.device == "cpu" else 0),
        "libraries_bytes": before,
        "losses": [round(each, 4) for each in losses],
    }


def _prepared(directory: Path, case: Case, device: Any, request: TrainRequest) -> Any:
    """Return the model as the case trains it."""
    import torch

    from mst.training import activation_offloading, adapters

    made = case.configuration
    model: Any = adapters.load_model(
        directory, made.weights_dtype, made.attention, device, made.quantization
    )
    torch.manual_seed(0)
    config = None if made.tuner == "full" else adapters.lora_config(request)
    model = adapters.prepare_model(model, config)
    if made.checkpointing:
        adapters.enable_checkpointing(model, made.checkpointed_layers)
    if made.activation_offloading:
        activation_offloading.offload_activations(model, device)
    return model


def _rows(case: Case) -> list[Example]:
    """Return rows of the case's lengths, whose last tokens are labels."""
    import array

    from mst.data.encode import IGNORE, Example
    from mst.data.rows import Row

    return [
        Example(
            array.array("i", range(3, 3 + n)),
            array.array("i", [IGNORE] * (n - case.labels) + [*range(3, 3 + case.labels)]),
            Row((), "", i),
        )
        for i, n in enumerate(case.lengths * case.configuration.accumulation)
    ]


def _plan(case: Case, device: Any, rows: int) -> Plan:
    from mst.plan import Plan

    made, steps = case.configuration, STEPS[case.device]
    return from_json(Plan, {
        "backend": case.device, "torch_devices": [str(device)], "distributed_backend": "gloo",
        "strategy": "single", "tuner": made.tuner, "compute_dtype": made.compute_dtype,
        "weights_dtype": made.weights_dtype, "attention": made.attention, "threads": 1,
        "environment": {}, "max_length": max(case.lengths),
        "per_device_train_batch_size": made.micro_batch,
        "gradient_accumulation_steps": made.accumulation,
        "gradient_checkpointing": made.checkpointing, "learning_rate": 1e-4,
        "train_rows": rows, "val_rows": 0, "steps_per_epoch": steps, "total_steps": steps,
        "label_accuracy": False, "memory": to_json(MemoryForecast(0, 0, 0, 0, 0, 0, 0, None)),
        "reasons": [], "chunked_loss": made.chunked_loss, "compiled": made.compiled,
    })  # fmt: skip


def _compile(
    model: Any, device: Any, plan: Plan, request: TrainRequest, rows: list[Example], layout: Layout
) -> str:
    """Compile the model's layers as a worker does; return why they are not."""
    import torch

    from mst.cache import cache_dir
    from mst.training.compilation import compile_layers
    from mst.training.objectives import find_objective
    from mst.training.session import logits_in
    from mst.training.tensor_kind import tensor_kind

    return compile_layers(
        model, device, getattr(torch, plan.compute_dtype), layout,
        tensor_kind(plan, request, find_objective(request), rows, layout),
        logits_in(model, device, plan), False, cache_dir(),
    )  # fmt: skip


def _resident() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(each for each in file if each.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def run_case(case: Case, models: Path) -> dict[str, Any]:
    """Return what was measured of a case, in a process of its own."""
    on_host = case.device == "cpu"
    user = dict(os.environ) if on_host else simchip_environment(memory_bytes=16 * GIB)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_forecast", "--measure", str(models / case.shape)],
        input=json.dumps(to_json(case)),
        env=worker_environment(user, ONE_THREAD | heap_environment(case.configuration.heap)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"case": case.name, "error": done.stderr.strip().splitlines()[-1][:300]}
    return {"case": case.name, **json.loads(done.stdout.splitlines()[-1])}


def trace_case(case: Case, models: Path) -> dict[str, Any]:
    """Return what the trace says of a case; nothing where it says nothing."""
    if why_not(case.configuration):
        return {}
    on_host = case.device == "cpu"
    told = trace(
        models / case.shape, case.configuration, step_shape(case), os.environ, on_host,
        _kernel(case),
    )  # fmt: skip
    return {"trace": to_json(told), "traced_bytes": told.peak_bytes}


def _kernel(case: Case) -> str:
    # The simulated chip has no attention kernel of its own.
    return "fused" if case.device == "cpu" else "math"


def forecast_of(case: Case, facts: ModelFacts) -> MemoryForecast:
    """Return the forecast of a case, as the planner makes it."""
    on_host = case.device == "cpu"
    return forecast(
        facts, case.configuration, step_shape(case), None, on_host, attention_kernel=_kernel(case)
    )


def compared(line: dict[str, Any], case: Case, facts: ModelFacts) -> dict[str, Any]:
    """Return a case's line with the forecast, and both estimates' errors."""
    told = forecast_of(case, facts)
    parts = to_json(told)
    parts.pop("available_bytes")
    expected = told.peak_bytes - _libraries(case)
    measured = line["measured_bytes"]
    traced = line.get("traced_bytes")
    return {
        "case": line["case"],
        "measured_bytes": measured,
        "forecast_bytes": expected,
        "forecast_error": round(expected / measured - 1, 4),
        "traced_bytes": traced,
        "trace_error": round(traced / measured - 1, 4) if traced else None,
        "parts": parts,
    }


def _libraries(case: Case) -> int:
    from mst.memory import LIBRARIES_BYTES

    return LIBRARIES_BYTES if case.device == "cpu" else 0


def summary(device: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the errors of both estimates over a device's cases."""
    found: dict[str, Any] = {"device": device, "cases": len(lines)}
    for name in ("forecast", "trace"):
        errors = [one[f"{name}_error"] for one in lines if one[f"{name}_error"] is not None]
        sizes = sorted(abs(each) for each in errors)
        if sizes:
            found |= {
                f"{name}_median_error": round(statistics.median(sizes), 4),
                f"{name}_95th_percentile": sizes[max(0, -(-len(sizes) * 95 // 100) - 1)],
                f"{name}_worst_under": min(0.0, *errors),
                f"{name}_worst_over": max(0.0, *errors),
            }
    return found


def kept_lines(path: Path | None) -> dict[str, dict[str, Any]]:
    """Return the lines that an earlier run has left, by their case."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]
    return {one["case"]: one for one in lines if "measured_bytes" in one}


def _measured(
    wanted: Sequence[Case], models: Path, output: Path | None
) -> Iterator[tuple[Case, dict[str, Any]]]:
    known = kept_lines(output)
    for case in wanted:
        directory = models / case.shape
        if not (directory / "config.json").exists():
            write_model(SHAPES[case.shape], directory)
        line = known.get(case.name, {})
        if "trace" not in line and not ("measured_bytes" in line and why_not(case.configuration)):
            line = line or run_case(case, models)
            if "error" not in line:
                line |= trace_case(case, models)
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        yield case, line


def main() -> int:
    """Measure what was asked for; 1 when a case could not be run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="cases whose name has them all")
    parser.add_argument("--output", type=Path, help="keeps what is measured; read when it exists")
    parser.add_argument("--models", type=Path, help="keeps the random models")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    # As in every worker of mst: a plan without quantization doesn't load bitsandbytes.
    hide_packages(keep=("bitsandbytes",))
    if given.measure is not None:
        print(json.dumps(measure(given.measure, from_json(Case, json.load(sys.stdin)))))
        return 0
    known = [*cases(), *some_layers(), *short_rows(), *offloaded()]
    wanted = [each for each in known if set(given.words) <= set(each.name.split())]
    lines: dict[str, list[dict[str, Any]]] = {}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mst-memory-") as scratch:
        models = given.models or Path(scratch)
        facts: dict[str, ModelFacts] = {}
        for case, line in _measured(wanted, models, given.output):
            if "error" in line:
                failed += 1
                print(json.dumps(line), flush=True)
                continue
            if case.shape not in facts:
                facts[case.shape] = read_facts(models / case.shape)
            told = compared(line, case, facts[case.shape])
            lines.setdefault(case.device, []).append(told)
            print(json.dumps(told), flush=True)
    for device, found in lines.items():
        print(json.dumps(summary(device, found)), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
