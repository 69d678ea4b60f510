"""Forecast and measured time of an optimizer step on this CPU, over a spread of configurations.

`python benchmarks/time_forecast.py [--steps 5] [--only TEXT]` prints one JSON line a case, then
one for the peaks and one that sums up. Each case trains with the project's loop in a process of
its own, on one thread, whose processor time is measured: others beside it make it no longer but for
the memory that they share. The CPU's efficiencies in `mst.time_forecast` were fitted to the cases
marked "fit", those of attention in blocks to none of them; what counts is the other half. `--again
FILE` takes what such a run measured and forecasts it with the table as it is now.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mst.cache import cache_dir
from mst.configuration import Configuration
from mst.facts import Capabilities, DeviceFacts
from mst.launch import offline_environment
from mst.model.facts import ModelFacts
from mst.plan import TimeForecast
from mst.request import TrainRequest

SEED = 42
RANK = 8
WARM_UP = 2
SIDE = 2048
# Of SmolLM2-135M's kind, and smaller: hidden, layers, inner width, heads, key-value heads, rows
# of the embedding.
SHAPES = {
    "llama-55m": (512, 12, 1408, 8, 4, 32000),
    "llama-12m": (256, 8, 704, 4, 4, 16000),
}


@dataclass(frozen=True)
class Case:
    """One configuration: a model, a method, and the rows of a step."""

    model: str
    tuner: str
    dtype: str
    micro_batch: int
    length: int
    checkpointing: bool = False
    accumulation: int = 1
    quantization: str = "none"
    blocks: bool = True

    @property
    def name(self) -> str:
        """Its words, as `--only` looks for them."""
        method = self.tuner if self.quantization == "none" else self.quantization
        tail = " checkpointing" if self.checkpointing else ""
        rows = f"{self.accumulation}x{self.micro_batch}x{self.length}"
        return f"{self.model} {method} {self.dtype} {rows}{tail}"


def cases() -> list[Case]:
    """Return the spread; methods take turns, and so do the halves, at another rhythm."""
    found = []
    for model in ("smollm2-135m", *SHAPES):
        shapes = [(1, 128), (1, 512), (4, 64), (4, 256)]
        if model != "smollm2-135m":
            shapes += [(8, 256), (1, 1024)]
        for micro_batch, length in shapes:
            found.append(Case(model, "lora", "bfloat16", micro_batch, length))
            found.append(Case(model, "full", "bfloat16", micro_batch, length))
        found += [
            Case(model, "lora", "bfloat16", 1, 512, checkpointing=True),
            Case(model, "lora", "bfloat16", 2, 256, checkpointing=True),
            Case(model, "full", "bfloat16", 1, 512, checkpointing=True),
            Case(model, "full", "bfloat16", 2, 128, accumulation=4),
            Case(model, "lora", "bfloat16", 2, 128, accumulation=4),
            Case(model, "lora", "float32", 1, 256),
            Case(model, "lora", "float32", 4, 128),
            Case(model, "full", "float32", 1, 256),
            Case(model, "full", "float32", 4, 128, checkpointing=True),
        ]
    for model in ("smollm2-135m", "llama-55m"):
        for micro_batch, length in ((1, 512), (4, 64)):
            found.append(Case(model, "qlora", "bfloat16", micro_batch, length, quantization="nf4"))
    return found + long_and_short()


def long_and_short() -> list[Case]:
    """Return cases of as many tokens in short rows and in long ones; nothing is fitted to them."""
    shapes = [("bfloat16", 16, 128), ("bfloat16", 2, 1024), ("bfloat16", 1, 2048),
              ("float32", 16, 128), ("float32", 2, 1024)]  # fmt: skip
    return [Case("smollm2-135m", "lora", *shape) for shape in shapes]


def model_directory(name: str) -> Path:
    """Return the model's directory, made once: a real one, or random weights of a shape."""
    from mst.model.gguf import convert
    from mst.model.locate import default_model

    if name not in SHAPES:
        return convert(default_model().path, cache_dir())
    target = Path(tempfile.gettempdir()) / f"mst-benchmark-{os.getuid()}" / name
    if not (target / "config.json").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, layers, inner, heads, pairs, vocab = SHAPES[name]
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=True,
            max_position_embeddings=4096,
        )  # fmt: skip
        torch.manual_seed(SEED)
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(target)
    return target


def one_core() -> DeviceFacts:
    """Return the facts of one core of this machine."""
    from mst_backends.cpu import read_facts

    return read_facts(affinity=sorted(os.sched_getaffinity(0))[:1])


def configuration(case: Case) -> Configuration:
    """Return the case as the planner would name it."""
    return Configuration(
        tuner=case.tuner,
        quantization=case.quantization,
        compute_dtype=case.dtype,
        weights_dtype="float32" if case.tuner == "full" else case.dtype,
        lora_rank=RANK,
        checkpointing=case.checkpointing,
        micro_batch=case.micro_batch,
        accumulation=case.accumulation,
        block_attention=case.blocks,
    )


def forecast(case: Case, model: ModelFacts) -> TimeForecast:
    """Return what the planner would say; half of each row carries loss."""
    from mst.time_forecast import step_time

    tokens = case.accumulation * case.micro_batch * case.length
    found = step_time(model, configuration(case), tokens, tokens / 2, case.length, one_core())
    assert found is not None, "this CPU's peak is not known"
    return found


def measured_seconds(case: Case, steps: int) -> list[float]:
    """Return processor seconds of each step after the warm-up, trained with the project's loop."""
    import random

    import torch

    from mst.data.encode import Example
    from mst.data.rows import Message, Row
    from mst.model.facts import read_facts
    from mst.planner import plan
    from mst.training.adapters import enable_checkpointing, load_model, lora_config, prepare_model
    from mst.training.block_attention import use_block_attention
    from mst.training.checkpoint import TrainState
    from mst.training.loop import run
    from mst.training.session import make_session
    from mst.workload import DataFacts

    torch.set_num_threads(1)
    rows, length = case.accumulation * case.micro_batch, case.length
    directory = model_directory(case.model)
    facts = read_facts(directory)
    draw = random.Random(SEED)
    examples = []
    for _ in range(rows):
        ids = array("i", [draw.randrange(10, facts.vocab_size) for _ in range(length)])
        labels = array("i", [-100] * (length // 2)) + ids[length // 2 :]
        examples.append(Example(ids, labels, Row((Message("user", ""),), "", 1)))
    request = TrainRequest(
        tuner=case.tuner, dtype=case.dtype, max_steps=WARM_UP + steps, lora_rank=RANK,
        per_device_train_batch_size=case.micro_batch, seed=SEED, save_steps=10**6,
        gradient_accumulation_steps=case.accumulation, learning_rate=1e-5,
        gradient_checkpointing="on" if case.checkpointing else "off",
    )  # fmt: skip
    data = DataFacts((length,) * rows, (length // 2,) * rows, 0, None, length, length, 0)
    device = DeviceFacts("cpu", 0, "cpu", "", None, None, ("bfloat16", "float32"), 1)
    able = Capabilities("cpu", "gloo", quantization=("none", "nf4"), attention=("sdpa",))
    made = plan("cpu", (device,), (able,), {}, facts,
                data, request)  # fmt: skip
    if case.blocks:
        use_block_attention()
    cpu = torch.device("cpu")
    model = load_model(
        directory, made.weights_dtype, made.attention, cpu, made.quantization, made.compute_dtype
    )
    model = prepare_model(model, None if case.tuner == "full" else lora_config(request))
    if case.checkpointing:
        enable_checkpointing(model)
    clock = Clock()
    with tempfile.TemporaryDirectory() as checkpoints:
        session = make_session(
            model, cpu, made, request, packing=True, train=examples, pad_token_id=0,
            checkpoints=Path(checkpoints), reporter=clock, stop_asked=lambda: False,
        )  # fmt: skip
        run(session, TrainState())
    ends = clock.ends[WARM_UP - 1 :]
    return [after - before for before, after in itertools.pairwise(ends)]


class Clock:
    """Notes this process's time at the end of each step."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.ends: list[float] = []

    def step(self, metrics: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    def evaluation(self, metrics: Any) -> None:
        """Nothing is held out."""

    def saved(self, step: int) -> None:
        """Saving is not timed."""

    def shrunk(self, step: int, before: int, after: int) -> None:
        """Not asked for."""


def child(number: int, steps: int) -> None:
    """Run one case in this process and print what it took."""
    print(json.dumps(measured_seconds(cases()[number], steps)), flush=True)


def measure(number: int, steps: int) -> dict[str, Any]:
    """Run one case in a fresh process with the backend's environment; return its line."""
    from mst_backends.cpu import mst_environment

    case = cases()[number]
    load = os.getloadavg()[0]
    environment = {**os.environ, **offline_environment(), **mst_environment((one_core(),))}
    command = [sys.executable, __file__, "--child", str(number), "--steps", str(steps)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    fitted = number % 4 in (0, 3) and case.tuner != "qlora" and case not in long_and_short()
    return {
        "half": "fit" if fitted else "held out",
        "measured_seconds": round(statistics.median(seconds), 4),
        "spread": round(max(seconds) / min(seconds), 3),
        "load_before": round(load, 2),
    }


def line(case: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a case: its forecast beside what was measured."""
    from mst.model.facts import read_facts

    found = forecast(case, read_facts(model_directory(case.model)))
    ratio = found.step_seconds / measured["measured_seconds"]
    return {
        "case": case.name,
        "half": measured["half"],
        "forecast_seconds": round(found.step_seconds, 4),
        "measured_seconds": measured["measured_seconds"],
        "ratio": round(ratio, 3),
        "spread": measured["spread"],
        "inside": 1 / found.uncertainty <= ratio <= found.uncertainty,
        "uncertainty": found.uncertainty,
        "load_before": measured["load_before"],
        **asdict(case),
    }


def again(file: Path) -> None:
    """Print a recorded run's lines with the forecasts of the table as it is now."""
    recorded = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    known = {case.name: case for case in cases()}
    # Lines that don't say so are older than attention in blocks.
    found = [
        line(replace(known[one["case"]], blocks=one.get("blocks", False)), one)
        for one in recorded
        if one["case"] in known
    ]
    others = [one for one in recorded if one["case"] == "peaks"]
    for each in [*others, *found, summary(found)]:
        print(json.dumps(each), flush=True)


def peaks() -> dict[str, Any]:
    """Return the peaks that the facts declare beside those of products measured here."""
    import torch

    from mst.conformance.timing import seconds_of
    from mst_backends.cpu import read_facts

    lines: dict[str, Any] = {"case": "peaks"}
    cpus = sorted(os.sched_getaffinity(0))
    for threads in sorted({1, min(2, len(cpus))}):
        device = read_facts(affinity=cpus[:threads])
        torch.set_num_threads(threads)
        for name, declared in device.peak_tflops.items():
            left = torch.ones(SIDE, SIDE, dtype=getattr(torch, name))
            taken = seconds_of(left.device, functools.partial(torch.mm, left, left))
            got = 2 * SIDE**3 / taken / 1e12
            lines[f"{name}_{threads}_threads"] = {
                "declared_tflops": round(declared, 3),
                "measured_tflops": round(got, 3),
                "share": round(got / declared, 3),
            }
        lines["source"] = device.sources["peak_tflops"]
    return lines


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of each half, and of each method in the held-out one."""
    found: dict[str, Any] = {
        "case": "summary",
        "date": date.today().isoformat(),
        "cpu": one_core().name,
        "threads": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    held = [each for each in lines if each["half"] == "held out"]
    groups = {
        "fit": [each for each in lines if each["half"] == "fit"],
        "held_out": held,
        **{f"held_out_{tuner}": [one for one in held if one["tuner"] == tuner]
           for tuner in ("lora", "qlora", "full")},
    }  # fmt: skip
    for name, group in groups.items():
        if group:
            logs = [abs(math.log(each["ratio"])) for each in group]
            found[name] = {
                "cases": len(group),
                "median_ratio": round(statistics.median(one["ratio"] for one in group), 3),
                "median_factor_off": round(math.exp(statistics.median(logs)), 3),
                "worst_factor_off": round(math.exp(max(logs)), 3),
                "share_inside": round(sum(one["inside"] for one in group) / len(group), 3),
            }
    return found


def main() -> None:
    """Print each case, or run as a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--again", type=Path, metavar="FILE", help="a recorded run")
    parser.add_argument("--child", type=int)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child, args.steps)
        return
    if args.again is not None:
        again(args.again)
        return
    print(json.dumps(peaks()), flush=True)
    lines = []
    for number, case in enumerate(cases()):
        if args.only in case.name:
            lines.append(line(case, measure(number, args.steps)))
            print(json.dumps(lines[-1]), flush=True)
    print(json.dumps(summary(lines)), flush=True)


if __name__ == "__main__":
    main()
