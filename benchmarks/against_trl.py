"""Tokens a second, peak memory and losses beside TRL's SFTTrainer: same rows, model and adapters.

`python benchmarks/against_trl.py [--pairs 3] [--steps 10]` prints one JSON line a case; needs the
`bench` extra. The two take turns, each run in a process of its own, so that a machine whose speed
drifts is fair to both; the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mst.data.prepare import Prepared, prepare
from mst.demo import demo_data
from mst.job import cache_dir
from mst.launch import offline_environment
from mst.model.gguf import convert
from mst.model.locate import default_model
from mst.request import TrainRequest
from mst.training.order import row_sizes, step_rows

WARM_UP = 2
RANK = 8
RATE = 1e-3
SEED = 42


def rows_of_steps(prepared: Prepared, batch: int, steps: int) -> list[Any]:
    """Return the examples in the order in which both trainers see them."""
    rows = prepared.train.examples
    sizes = row_sizes(rows, None)
    return [rows[i] for step in range(steps) for (i,) in step_rows(sizes, step, batch, SEED)]


def load(model_dir: Path, dtype: str) -> Any:
    """Return the model with fresh adapters, the same for both trainers."""
    import torch

    from mst.training.adapters import load_model, lora_config, prepare_model

    model = load_model(model_dir, dtype, "sdpa", torch.device("cpu"))
    torch.manual_seed(SEED)
    return prepare_model(model, lora_config(TrainRequest(lora_rank=RANK)))


class Clock:
    """Collects what a trainer reports of each step."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.losses: list[float] = []
        self.ends: list[float] = []

    def step(self, metrics: Any) -> None:
        """Note the loss and the time."""
        self.losses.append(metrics.loss)
        self.ends.append(time.perf_counter())

    def evaluation(self, metrics: Any) -> None:
        """Nothing is held out."""

    def saved(self, step: int) -> None:
        """Saving is not timed: the last step's time is taken before it."""

    def shrunk(self, step: int, before: int, after: int) -> None:
        """Not asked for."""


def run_mst(prepared: Prepared, model_dir: Path, dtype: str, batch: int, steps: int) -> Clock:
    """Train with our loop."""
    import torch

    from mst.data.prepare import data_facts
    from mst.facts import Capabilities, DeviceFacts
    from mst.model.facts import read_facts
    from mst.planner import plan
    from mst.training.checkpoint import TrainState
    from mst.training.isolation import rows_stay_apart
    from mst.training.loop import run
    from mst.training.session import make_session

    request = TrainRequest(
        max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        learning_rate=RATE, dtype=dtype, warmup_ratio=0.0, lr_scheduler_type="constant",
        tuner="lora", seed=SEED, save_steps=10**6, lora_rank=RANK,
    )  # fmt: skip
    device = DeviceFacts("cpu", 0, "cpu", "", None, None, ("bfloat16", "float32"), 2)
    made = plan(
        "cpu", (device,), (Capabilities("cpu", "gloo"),), {}, read_facts(model_dir),
        data_facts(prepared), request,
    )  # fmt: skip
    model = load(model_dir, dtype)
    cpu = torch.device("cpu")
    packing = rows_stay_apart(model, prepared.tokenizer.vocab_size, cpu)
    clock = Clock()
    with tempfile.TemporaryDirectory() as checkpoints:
        session = make_session(
            model, cpu, packing, prepared.train.examples, (), prepared.tokenizer.pad_token_id,
            made, request, Path(checkpoints), clock, lambda: False,
        )  # fmt: skip
        run(session, TrainState())
    return clock


def run_trl(prepared: Prepared, model_dir: Path, dtype: str, batch: int, steps: int) -> Clock:
    """Train with TRL's SFTTrainer, its gradient checkpointing off as ours is."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = rows_of_steps(prepared, batch, steps)
    data = Dataset.from_list(
        [
            {
                "input_ids": list(each.input_ids),
                "completion_mask": [int(label != -100) for label in each.labels],
            }
            for each in rows
        ]
    )
    clock = Clock()

    class Note(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(data)

    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, per_device_train_batch_size=batch, max_steps=steps,
            learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, report_to=[],
            bf16=dtype == "bfloat16", gradient_checkpointing=False, save_strategy="no",
            use_cpu=True, packing=False, completion_only_loss=True, max_length=None,
            disable_tqdm=True, dataloader_pin_memory=False, weight_decay=0.0, seed=SEED,
        )  # fmt: skip
        trainer = InOrder(
            model=load(model_dir, dtype), args=config, train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(model_dir), callbacks=[Note()],
        )  # fmt: skip
        trainer.train()
    return clock


def child(side: str, dtype: str, batch: int, steps: int) -> None:
    """Run one trainer in this process and print what it measured."""
    import torch

    # Both sides get the same two threads, whatever the machine has.
    torch.set_num_threads(2)
    model_dir = convert(default_model().path, cache_dir())
    request = TrainRequest(val_size=0.0)
    prepared = prepare(request, demo_data()[:1], model_dir, None)
    runner = {"mst": run_mst, "trl": run_trl}[side]
    clock = runner(prepared, model_dir, dtype, batch, steps)
    rows = rows_of_steps(prepared, batch, steps)[WARM_UP * batch :]
    tokens = sum(len(each.input_ids) for each in rows)
    found = {
        "tokens_per_second": tokens / (clock.ends[steps - 1] - clock.ends[WARM_UP - 1]),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": clock.losses[:steps],
    }
    print(json.dumps(found), flush=True)


def measure(side: str, dtype: str, batch: int, steps: int) -> dict[str, Any]:
    """Run one side in a fresh process, with the environment that each would have in use."""
    import os

    from mst_backends.cpu import mst_environment, read_facts

    environment = os.environ | offline_environment()
    if side == "mst":
        environment |= mst_environment((read_facts(),))
    command = [sys.executable, __file__, "--child", side, "--dtype", dtype, "--batch", str(batch)]
    done = subprocess.run(
        [*command, "--steps", str(steps)],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def case(dtype: str, batch: int, steps: int, pairs: int) -> dict[str, Any]:
    """Return one case: medians of both sides, and the medians of the ratios, pair by pair."""
    found = [
        (measure("mst", dtype, batch, steps), measure("trl", dtype, batch, steps))
        for _ in range(pairs)
    ]

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    differences = [
        max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        for ours, theirs in found
    ]
    return {
        "case": f"SmolLM2-135M lora r={RANK} all-linear {dtype} batch {batch}, banking77 rows",
        "pairs": pairs,
        "steps": steps,
        "tokens_per_second_mst": median([ours["tokens_per_second"] for ours, _ in found]),
        "tokens_per_second_trl": median([theirs["tokens_per_second"] for _, theirs in found]),
        "speed_ratio": median([a["tokens_per_second"] / b["tokens_per_second"] for a, b in found]),
        "peak_rss_ratio": median([a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in found]),
        "peak_rss_bytes_mst": median([ours["peak_rss_bytes"] for ours, _ in found]),
        "largest_loss_difference": max(differences),
        "losses_mst": [round(each, 6) for each in found[0][0]["losses"]],
        "losses_trl": [round(each, 6) for each in found[0][1]["losses"]],
    }


def main() -> None:
    """Print each case, or run as a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--child", choices=["mst", "trl"])
    parser.add_argument("--dtype")
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.dtype, args.batch, args.steps)
        return
    print(json.dumps(case("bfloat16", 16, args.steps, args.pairs)), flush=True)
    print(json.dumps(case("bfloat16", 4, args.steps, args.pairs)), flush=True)
    print(json.dumps(case("float32", 8, max(4, args.steps // 2), 1)), flush=True)


if __name__ == "__main__":
    main()
