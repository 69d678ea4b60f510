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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.simulated import GIB, simchip_environment

from mst.configuration import Configuration
from mst.extensions import hide_packages
from mst.launch import worker_environment
from mst.memory import StepShape, forecast
from mst.memory.runtime import heap_environment
from mst.memory_trace import trace, why_not
from mst.model.facts import ModelFacts, read_facts
from mst.plan import MemoryForecast
from mst.serial import from_json, to_json
from mst.training.batches import BatchShape, batch_shape, layout_of, lines_of

if TYPE_CHECKING:
    from mst.data.encode import Example
    from mst.plan import Plan
    from mst.request import TrainRequest

# A CPU's heap grows over the first ones: SmolLM2's by 2 % from the third to the twelfth. The chip's
# allocator counts tensors, and the optimizer's are all there after the first.
STEPS = {"cpu": 12, "simchip": 3}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Shape:
    """A model with random weights: what its config.json says."""

    kind: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool


SHAPES = {
    "llama-5m": Shape("llama", 4096, 256, 688, 4, 4, 2, False),
    "llama-38m": Shape("llama", 8192, 512, 1408, 10, 8, 4, False),
    "qwen3-48m": Shape("qwen3", 16384, 512, 1536, 12, 8, 4, True),
    "qwen2-90m": Shape("qwen2", 32768, 640, 1728, 16, 10, 2, True),
    "smollm2-135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, True),
    "llama-280m": Shape("llama", 16384, 1024, 2816, 20, 16, 4, False),
}


@dataclass(frozen=True)
class Case:
    """One configuration of one model on one device.

    Attributes:
        device: "cpu" or "simchip".
        shape: a key of `SHAPES`.
        configuration: how it is trained.
        lengths: tokens of each row of the micro-batch.
        labels: of these, how many at the end of each row carry loss.
        packing: rows are laid end to end where `mst.training.batches` does so.
    """

    device: str
    shape: str
    configuration: Configuration
    lengths: tuple[int, ...]
    labels: int
    packing: bool

    @property
    def name(self) -> str:
        """What tells this case from all others."""
        made = self.configuration
        parts = [
            self.device, self.shape, made.tuner, f"r{made.lora_rank}", made.compute_dtype,
            made.attention, _recomputed(made),
            f"{made.accumulation}x{len(self.lengths)}x{max(self.lengths)}",
            "padded" if len(set(self.lengths)) > 1 else "even", f"{self.labels}l",
            "packed" if laid_out(self).packed else "rows",
            *(["roomy"] if made.heap == "roomy" else []),
            *(["compiled"] if made.compiled else []),
            *(["offloaded"] if made.activation_offloading else []),
        ]  # fmt: skip
        return " ".join(parts)


def _recomputed(made: Configuration) -> str:
    if not made.checkpointing:
        return "whole"
    return "checkpointing" + (f"-{made.checkpointed_layers}" if made.checkpointed_layers else "")


def _case(
    device: str,
    shape: str,
    tuner: str,
    rows: int,
    length: int,
    labels: int,
    *flags: str,
    rank: int = 8,
    accumulation: int = 1,
    recomputed: int | None = None,
) -> Case:
    """Return a case.

    Flags are "fp32", "eager", "ckpt", "padded", "packed", "roomy", "compiled", "offloaded".
    """
    compute = "float32" if "fp32" in flags else "bfloat16"
    lengths = [length - (16 * i if "padded" in flags else 0) for i in range(rows)]
    made = Configuration(
        tuner=tuner,
        quantization="nf4" if tuner == "qlora" else "none",
        compute_dtype=compute,
        weights_dtype="float32" if tuner == "full" else compute,
        lora_rank=rank,
        attention="eager" if "eager" in flags else "sdpa",
        checkpointing="ckpt" in flags or recomputed is not None,
        checkpointed_layers=recomputed,
        micro_batch=rows,
        accumulation=accumulation,
        # As the planner chooses where there is room; the others are what it falls back to.
        chunked_loss="roomy" in flags,
        heap="roomy" if "roomy" in flags else "tight",
        compiled="compiled" in flags,
        activation_offloading="offloaded" in flags,
    )
    packing = device == "cpu" or "packed" in flags
    return Case(device, shape, made, tuple(lengths), labels, packing)


def cases() -> list[Case]:
    """Return all cases."""
    both: list[tuple[Any, ...]] = [
        ("llama-5m", "lora", 4, 256, 256),
        ("llama-5m", "full", 4, 256, 64, "fp32"),
        ("llama-38m", "lora", 1, 1024, 1024),
        ("llama-38m", "lora", 4, 512, 512, "ckpt"),
        ("llama-38m", "lora", 2, 512, 64, "fp32"),
        ("llama-38m", "lora", 2, 512, 512, "eager"),
        ("llama-38m", "full", 2, 512, 512),
        ("llama-38m", "full", 2, 512, 512, "fp32", "ckpt"),
        ("llama-38m", "full", 1, 256, 32),
        ("qwen3-48m", "lora", 2, 384, 384),
        ("qwen3-48m", "lora", 6, 512, 32, "padded"),
        ("qwen3-48m", "lora", 1, 2048, 256, "ckpt"),
        ("qwen3-48m", "full", 1, 512, 512, "ckpt"),
        ("qwen2-90m", "lora", 2, 256, 256, "fp32"),
        ("qwen2-90m", "lora", 2, 512, 512, "ckpt", "eager"),
        ("qwen2-90m", "full", 1, 256, 256, "fp32"),
        ("smollm2-135m", "lora", 1, 512, 512),
        ("smollm2-135m", "lora", 1, 1024, 64, "ckpt"),
        ("smollm2-135m", "full", 1, 256, 256),
        ("llama-280m", "lora", 1, 256, 256),
        ("llama-280m", "lora", 1, 512, 512, "ckpt", "fp32"),
    ]  # fmt: skip
    # Layers run compiled where lines have padding or several rows: without either there is no mask.
    compiled: list[tuple[Any, ...]] = [
        ("llama-38m", "lora", 3, 512, 384),
        ("llama-38m", "lora", 3, 512, 64, "fp32"),
        ("llama-38m", "full", 3, 384, 256),
        ("qwen2-90m", "lora", 3, 256, 192, "fp32"),
        ("qwen3-48m", "lora", 6, 512, 32),
        ("smollm2-135m", "lora", 3, 384, 64),
        ("smollm2-135m", "lora", 3, 512, 64, "ckpt"),
        ("llama-38m", "qlora", 3, 512, 384),
        ("smollm2-135m", "qlora", 3, 384, 64),
    ]
    found = [_case(device, *each) for device in ("simchip", "cpu") for each in both]
    found += [_case("cpu", *each, "padded", "roomy", "compiled") for each in compiled]
    found += [
        _case("cpu", *each, "roomy")
        for each in both
        if each[:4] in {
            ("llama-38m", "lora", 1, 1024), ("llama-38m", "lora", 4, 512),
            ("llama-38m", "full", 2, 512), ("qwen3-48m", "lora", 6, 512),
            ("qwen2-90m", "lora", 2, 256), ("smollm2-135m", "lora", 1, 512),
            ("smollm2-135m", "lora", 1, 1024), ("smollm2-135m", "full", 1, 256),
            ("llama-280m", "lora", 1, 256),
        }
    ]  # fmt: skip
    found += [
        _case(device, "llama-38m", "lora", 2, 512, 256, rank=64) for device in ("simchip", "cpu")
    ]
    found += [
        _case("simchip", "llama-38m", "lora", 1, 256, 256, rank=256),
        _case("simchip", "llama-38m", "full", 2, 256, 256, accumulation=2),
        _case("simchip", "qwen3-48m", "lora", 2, 512, 64, "eager", "padded"),
        _case("simchip", "llama-280m", "full", 1, 128, 128),
        _case("simchip", "qwen3-48m", "lora", 4, 256, 256, "packed"),
        _case("simchip", "llama-38m", "full", 4, 384, 64, "packed", "fp32"),
    ]
    found += [
        _case("cpu", "llama-38m", "qlora", 2, 512, 512),
        _case("cpu", "qwen3-48m", "qlora", 1, 512, 64, "ckpt"),
        _case("cpu", "smollm2-135m", "qlora", 1, 512, 512, rank=16),
        _case("cpu", "llama-280m", "qlora", 1, 256, 256, "ckpt"),
    ]
    return found


def some_layers() -> list[Case]:
    """Return cases of which the first layers are recomputed, some of them or none."""
    some: list[tuple[int | None, tuple[Any, ...]]] = [
        (None, ("llama-38m", "lora", 2, 256, 256)),
        (3, ("llama-38m", "lora", 2, 256, 256)),
        (7, ("llama-38m", "lora", 2, 256, 256)),
        (5, ("llama-38m", "full", 2, 128, 128, "fp32")),
        (6, ("qwen3-48m", "full", 1, 192, 192)),
        (8, ("qwen2-90m", "lora", 1, 256, 256, "eager")),
        (None, ("smollm2-135m", "lora", 1, 256, 64)),
        (10, ("smollm2-135m", "lora", 1, 256, 64)),
        (29, ("smollm2-135m", "lora", 1, 256, 64)),
    ]
    found = [
        _case(device, *each, recomputed=count)
        for device in ("simchip", "cpu")
        for count, each in some
    ]
    found += [
        _case("cpu", *each, "roomy", recomputed=count)
        for count, each in some
        if count in (3, 7, 10)
    ]
    return found


def short_rows() -> list[Case]:
    """Return cases on a CPU all of whose tensors are small, so that its heap holds them."""
    found: list[tuple[Any, ...]] = [
        ("qwen2-90m", "lora", 1, 256, 64),
        ("llama-280m", "lora", 1, 128, 64),
        ("qwen3-48m", "lora", 2, 128, 128),
        ("smollm2-135m", "lora", 1, 128, 64),
    ]
    return [_case("cpu", *each) for each in found]


def offloaded() -> list[Case]:
    """Return cases whose recomputed layers keep what they need on the host, all or some."""
    found: list[tuple[int | None, tuple[Any, ...]]] = [
        (None, ("llama-38m", "lora", 1, 384, 64)),
        (7, ("llama-38m", "lora", 1, 384, 64)),
        (None, ("llama-38m", "full", 1, 128, 64, "fp32")),
        (None, ("qwen3-48m", "lora", 1, 256, 64)),
    ]
    return [_case("simchip", *each, "ckpt", "offloaded", recomputed=count) for count, each in found]


def laid_out(case: Case) -> BatchShape:
    """Return the tensors of the case's micro-batch."""
    made = case.configuration
    layout = layout_of(case.packing, made.attention, made.compiled)
    lines = lines_of(case.lengths, layout)
    return batch_shape([[case.lengths[row] for row in line] for line in lines], layout)


def step_shape(case: Case) -> StepShape:
    """Return the case's micro-batch as the planner would describe it."""
    lengths = case.lengths
    made = laid_out(case)
    packed = made.packed
    # A label at position i is predicted from i - 1, and a row's first token by nothing.
    kept = {n - 2 - i for n in lengths for i in range(min(case.labels, n - 1))}
    total = sum(min(case.labels, n - 1) for n in lengths)
    return StepShape(
        tokens=made.lines * made.width,
        label_tokens=total,
        mask_values=made.lines * made.width**2 if packed else 0,
        rows=made.lines,
        width=made.width,
        kept=total if packed else len(kept),
        masked=made.masked,
        alike=True,
    )


def write_model(shape: Shape, directory: Path) -> None:
    """Write a model of this shape with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**vars(shape), "max_position_embeddings": 4096}
    kind = values.pop("kind")
    if kind == "qwen3":
        values["head_dim"] = shape.hidden_size // shape.num_attention_heads
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    untyped: Any = AutoModelForCausalLM
    untyped.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def measure(directory: Path, case: Case) -> dict[str, Any]:
    """Train the case in this process; return its peak and what there was before the model."""
    import array

    import torch

    from mst.data.encode import IGNORE, Example
    from mst.data.rows import Row
    from mst.plan import Plan
    from mst.request import TrainRequest
    from mst.training import activation_offloading, adapters, loop
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
    made, steps = case.configuration, STEPS[case.device]
    device = torch.device("cpu" if case.device == "cpu" else f"{case.device}:0")
    before = _resident()
    request = TrainRequest(lora_rank=made.lora_rank, target_modules=made.target_modules)
    model: Any = adapters.load_model(
        directory, made.weights_dtype, made.attention, device, made.quantization
    )
    torch.manual_seed(0)
    whole = made.tuner == "full"
    model = adapters.prepare_model(model, None if whole else adapters.lora_config(request))
    if made.checkpointing:
        adapters.enable_checkpointing(model, made.checkpointed_layers)
    if made.activation_offloading:
        activation_offloading.offload_activations(model, device)
    rows = [
        Example(
            array.array("i", range(3, 3 + n)),
            array.array("i", [IGNORE] * (n - case.labels) + [*range(3, 3 + case.labels)]),
            Row((), "", i),
        )
        for i, n in enumerate(case.lengths * made.accumulation)
    ]
    plan = from_json(Plan, {
        "backend": case.device, "torch_devices": [str(device)], "distributed_backend": "gloo",
        "strategy": "single", "tuner": made.tuner, "compute_dtype": made.compute_dtype,
        "weights_dtype": made.weights_dtype, "attention": made.attention, "threads": 1,
        "environment": {}, "max_length": max(case.lengths),
        "per_device_train_batch_size": made.micro_batch,
        "gradient_accumulation_steps": made.accumulation,
        "gradient_checkpointing": made.checkpointing, "learning_rate": 1e-4,
        "train_rows": len(rows), "val_rows": 0, "steps_per_epoch": steps, "total_steps": steps,
        "label_accuracy": False, "memory": to_json(MemoryForecast(0, 0, 0, 0, 0, 0, 0, None)),
        "reasons": [], "chunked_loss": made.chunked_loss, "compiled": made.compiled,
    })  # fmt: skip
    if made.compiled and (reason := _compile(model, device, plan, request, rows)):
        raise RuntimeError(reason)
    losses: list[float] = []

    class Losses(Reporters):
        def step(self, metrics: Any) -> None:
            losses.append(metrics.loss)

    with tempfile.TemporaryDirectory() as checkpoints:
        session = make_session(
            model, device, case.packing, rows, (), 0, plan, request, Path(checkpoints),
            Losses(), lambda: False, compiled=made.compiled,
        )  # fmt: skip
        reset_peak(device)
        loop.run(session, TrainState())
        peak = peak_bytes(device)
    return {
        "measured_bytes": peak - (before if case.device == "cpu" else 0),
        "libraries_bytes": before,
        "losses": [round(each, 4) for each in losses],
    }


def _compile(
    model: Any, device: Any, plan: Plan, request: TrainRequest, rows: Sequence[Example]
) -> str:
    """Compile the model's layers as a worker does; return why they are not."""
    import torch

    from mst.job import cache_dir
    from mst.training.batches import layout_of
    from mst.training.compilation import compile_layers
    from mst.training.objectives import find_objective
    from mst.training.session import logits_in
    from mst.training.tensor_kind import tensor_kind

    layout = layout_of(True, plan.attention, compiled=True)
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
