"""QLoRA's held-out loss, accuracy, time and memory beside LoRA's: same rows, steps and seeds.

`python benchmarks/qlora_quality.py [--steps 60] [--batch 16] [--held-out 120]` tunes the demo's
model on the demo's rows on the CPU, each way in a process of its own, one after the other, and
prints one JSON line a way, then one with the ratios. For a quantized base it also adds the adapter
into the dequantized weights and into the original ones, stores both sums in bfloat16 as `mst merge`
does, and measures what each loses. `--seeds 1 2 3` trains each way once a seed: ways of one seed
see the same rows in the same order, and a last line says how far seeds alone move the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.cache import cache_dir
from mst.data.prepare import Prepared, data_facts, prepare
from mst.demo import demo_data
from mst.launch import offline_environment
from mst.model.gguf import convert
from mst.model.locate import default_model
from mst.request import TrainRequest

if TYPE_CHECKING:
    from mst.plan import Plan
    from mst.training.session import Session

# Tuner, quantization, optimizer, and how the adapters begin.
WAYS = {
    "lora": ("lora", "none", "adamw_torch", "auto"),
    "nf4": ("qlora", "nf4", "adamw_torch", "auto"),
    "nf4, default": ("qlora", "nf4", "adamw_torch", "default"),
    "nf4, adamw_8bit": ("qlora", "nf4", "adamw_8bit", "auto"),
    "int8": ("qlora", "int8", "adamw_torch", "auto"),
}
SEED = 42
# The demo's own.
RATE = 2e-3
WARM_UP = 2


class Clock:
    """Notes when each step ended; a reporter of the loop."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.ends: list[float] = []

    def step(self, metrics: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def evaluation(self, metrics: Any) -> None:
        """Read from the state at the end."""

    def saved(self, step: int) -> None:
        """Not timed."""

    def shrunk(self, step: int, before: int, after: int) -> None:
        """Not asked for."""


def plan_of(way: str, prepared: Prepared, model_dir: Path, request: TrainRequest) -> Plan:
    """Return the plan of one of `WAYS`; all are alike but for what is named there."""
    from mst.facts import Capabilities, DeviceFacts
    from mst.model.facts import read_facts
    from mst.planner import plan
    from mst.probe import host_facts
    from mst.registry import load

    # bfloat16 takes several times as long as float32 on a CPU that doesn't multiply it.
    host = host_facts(load())
    dtypes = host.dtypes if host else ("float32",)
    device = DeviceFacts("cpu", 0, "cpu", "", None, None, dtypes, 2)
    made = plan(
        "cpu", (device,), (Capabilities("cpu", "gloo", attention=("sdpa", "eager")),), {},
        read_facts(model_dir), data_facts(prepared), request,
    )  # fmt: skip
    tuner, quantization, optim, _ = WAYS[way]
    return replace(made, tuner=tuner, quantization=quantization, optim=optim)


def session_of(
    plan: Plan, prepared: Prepared, model_dir: Path, request: TrainRequest, checkpoints: Path
) -> Session:
    """Return what the worker would train with."""
    import torch

    from mst.training import lora_init
    from mst.training.adapters import load_model, lora_config, prepare_model
    from mst.training.isolation import rows_stay_apart
    from mst.training.session import make_session

    cpu = torch.device("cpu")
    model = load_model(
        model_dir, plan.weights_dtype, plan.attention, cpu, plan.quantization, plan.compute_dtype
    )
    torch.manual_seed(request.seed)
    model = prepare_model(model, lora_config(request))
    if lora_init.wanted(plan.quantization, request):
        lora_init.begin_with_error(model, model_dir, prepared.train.examples, cpu)
    packing = rows_stay_apart(model, prepared.tokenizer.vocab_size, cpu)
    torch.manual_seed(request.seed)
    held_out = prepared.val.examples if prepared.val else ()
    return make_session(
        model, cpu, plan, request, packing=packing, train=prepared.train.examples, val=held_out,
        pad_token_id=prepared.tokenizer.pad_token_id, checkpoints=checkpoints, reporter=Clock(),
        stop_asked=lambda: False,
    )  # fmt: skip


def train(way: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Train one way in this process, leave its adapter in `directory`, return what was measured."""
    import torch

    from mst.evaluate.labels import chosen_rows, label_accuracy
    from mst.training.checkpoint import TrainState, write_weights
    from mst.training.loop import run

    torch.set_num_threads(arguments.threads)
    model_dir, request, prepared = _work(arguments)
    request = replace(request, init_lora_weights=WAYS[way][3])
    plan = plan_of(way, prepared, model_dir, request)
    session = session_of(plan, prepared, model_dir, request, directory / "checkpoints")
    state = run(session, TrainState()).state
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_weights(session.model, directory / "adapter")
    clock: Any = session.reporter
    found: dict[str, Any] = {
        "way": way,
        "seed": arguments.seed,
        "train_on": arguments.train_on,
        "steps": state.step,
        "eval_loss": state.best_loss,
        "step_seconds": (clock.ends[-1] - clock.ends[WARM_UP - 1]) / (len(clock.ends) - WARM_UP),
        "peak_rss_bytes": peak,
    }
    if arguments.accuracy:
        assert prepared.answers is not None
        accuracy = label_accuracy(
            session.model, chosen_rows([each.row for each in session.val]), prepared.answers,
            prepared.tokenizer, prepared.template, torch.bfloat16,
        )  # fmt: skip
        found |= {"accuracy": accuracy.restricted, "accuracy_rows": accuracy.rows}
    if plan.quantization != "none" and arguments.merged:
        for base in ("dequantized", "original"):
            found[f"eval_loss_merged_{base}"] = _merged_loss(base, session, model_dir, directory)
    return found


def _work(arguments: argparse.Namespace) -> tuple[Path, TrainRequest, Prepared]:
    model_dir = convert(default_model().path, cache_dir())
    train_file, test_file = demo_data()
    request = TrainRequest(
        tuner="lora", dtype="bfloat16", max_steps=arguments.steps, learning_rate=RATE,
        seed=arguments.seed,
        per_device_train_batch_size=arguments.batch, gradient_accumulation_steps=1,
        eval_steps=10**6, save_steps=10**6, val_dataset=(test_file,), train_on=arguments.train_on,
    )  # fmt: skip
    prepared = prepare(request, (train_file,), model_dir, None)
    assert prepared.val is not None
    kept = tuple(prepared.val.examples)[:: max(1, len(prepared.val.examples) // arguments.held_out)]
    val = replace(prepared.val, examples=kept[: arguments.held_out])
    return model_dir, request, replace(prepared, val=val)


def _merged_loss(base: str, session: Session, model_dir: Path, directory: Path) -> float:
    """Return the held-out loss of adapter and base in one, as `mst merge` stores it."""
    import torch

    from mst.training.adapters import merge_and_unload
    from mst.training.evaluation import held_out_loss
    from mst.tuned import TunedModel, load_dequantized

    plan = session.plan
    source = TunedModel(
        weights=str(model_dir),
        adapter=str(directory / "adapter"),
        tokenizer=str(model_dir),
        quantization=plan.quantization if base == "dequantized" else "none",
        weights_dtype=plan.weights_dtype,
    )
    model = merge_and_unload(load_dequantized(source, plan.attention, torch.device("cpu")))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return held_out_loss(replace(session, model=model))


def apart(way: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one way in a fresh process, with the environment that a worker has."""
    from mst_backends.cpu import mst_environment, read_facts

    environment = os.environ | offline_environment() | dict(mst_environment((read_facts(),)))
    environment["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                sys.executable, __file__, "--child", way, "--seed", str(seed),
                "--directory", directory, *sys.argv[1:],
            ],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return each way's figures over LoRA's."""
    base = found["lora"]
    keys = ("eval_loss", "step_seconds", "peak_rss_bytes")
    return {
        way: {key: round(each[key] / base[key], 4) for key in keys}
        for way, each in found.items()
        if way != "lora"
    }


def spread(runs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return each way's held-out loss over the seeds, and how far it is from LoRA's of one seed.

    Args:
        runs: of each seed, at least two, what was measured of each way.

    Returns:
        Means, and standard deviations of single runs; the standard error of a mean is that over
        the root of the number of seeds.
    """
    found: dict[str, Any] = {}
    for way in runs[0]:
        losses = [each[way]["eval_loss"] for each in runs]
        found[way] = {"mean": statistics.mean(losses), "deviation": statistics.stdev(losses)}
        if way != "lora" and "lora" in runs[0]:
            differences = [each[way]["eval_loss"] - each["lora"]["eval_loss"] for each in runs]
            found[way] |= {
                "difference_mean": statistics.mean(differences),
                "difference_deviation": statistics.stdev(differences),
            }
    return found


def main() -> None:
    """Print one JSON line a run, the ratios of each seed, then the spread over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-on", default="assistant", help="as in mst train")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--merged", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[SEED])
    parser.add_argument("--child", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(train(arguments.child, arguments, arguments.directory)), flush=True)
        return
    runs = []
    for seed in arguments.seeds:
        found = {}
        for way in arguments.ways:
            found[way] = apart(way, seed, arguments)
            print(json.dumps(found[way]), flush=True)
        if "lora" in found:
            print(json.dumps({"ratios": ratios(found)}), flush=True)
        runs.append(found)
    if len(runs) > 1:
        print(json.dumps({"seeds": arguments.seeds, "eval_loss": spread(runs)}), flush=True)


if __name__ == "__main__":
    main()
