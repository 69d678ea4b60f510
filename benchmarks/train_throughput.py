"""Tokens a second, peak memory and losses beside TRL's SFTTrainer: same rows, model and adapters.

`python benchmarks/train_throughput.py --dataset ROWS [--model llama qwen2 gemma3_text]` prints one
JSON line a case; needs the `bench` extra. In each of `--pairs` rounds all sides take turns, each in
a process of its own, so that a machine whose speed drifts is fair to them; a ratio is the median
over the rounds. Sides: mst with compiled layers and without, TRL as it comes, TRL with packing. A
float32 run of mst with plain layers gives the losses that bfloat16's are held against.

The model is SmolLM2-135M for llama; for others random weights of about its size. MFU is the model's
products over what one product of 2,048 squared reached in the same process. `--profile FILE` runs
mst once under torch's profiler instead, prints its table and writes a trace for a browser.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mst.data.prepare import Prepared, data_facts, prepare
from mst.demo import demo_data
from mst.facts import Capabilities
from mst.job import cache_dir
from mst.launch import offline_environment
from mst.memory.runtime import heap_environment
from mst.model.facts import read_facts
from mst.model.gguf import convert
from mst.model.locate import default_model
from mst.plan import Plan
from mst.planner import plan
from mst.request import TrainRequest
from mst.step_work import model_work
from mst.training.order import row_sizes, step_rows

WARM_UP = 2
RANK = 8
RATE = 2e-4
SEED = 42
ROWS = 120
MAX_LENGTH = 512
SIDES = ("mst", "mst-plain", "trl", "trl-packed")
# About SmolLM2-135M's size and shape, under its tokenizer.
SHAPES = {
    "qwen2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def request_of(side: str, dtype: str, batch: int, steps: int) -> TrainRequest:
    """Return what a side of mst trains with."""
    return TrainRequest(
        max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        learning_rate=RATE, dtype=dtype, warmup_ratio=0.0, lr_scheduler_type="constant",
        tuner="lora", seed=SEED, save_steps=10**6, lora_rank=RANK, max_length=MAX_LENGTH,
        torch_compile="on" if side == "mst" else "off",
    )  # fmt: skip


def rows_of_steps(prepared: Prepared, batch: int, steps: int) -> list[Any]:
    """Return the examples in the order in which mst and TRL without packing see them."""
    rows = prepared.train.examples
    sizes = row_sizes(rows, None)
    return [rows[i] for step in range(steps) for (i,) in step_rows(sizes, step, batch, SEED)]


def model_directory(kind: str, place: Path) -> Path:
    """Return the directory of a model; one with random weights is written to `place`."""
    smollm2 = convert(default_model().path, cache_dir())
    if kind == "llama":
        return smollm2
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(SEED)
    config: Any = AutoConfig
    causal: Any = AutoModelForCausalLM
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    shape = config.for_model(kind, vocab_size=49152, **ids, **SHAPES[kind])
    causal.from_config(shape, dtype=torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def load(model_dir: Path, dtype: str) -> Any:
    """Return the model with fresh adapters, the same for all."""
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
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.compile_seconds = 0.0

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

    def count(self, rows: Sequence[Any], batch: int) -> None:
        """Note the tokens of each step of `batch` rows."""
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            self.tokens.append(sum(len(each.input_ids) for each in part))
            self.labels.append(sum(label != -100 for each in part for label in each.labels))


def planned(request: TrainRequest, prepared: Prepared, model_dir: Path) -> Plan:
    """Return the plan of this machine's CPU."""
    from mst_backends.cpu import mst_capabilities
    from mst_backends.cpu import read_facts as cpu_facts

    able: Capabilities = mst_capabilities()
    data = data_facts(prepared)
    return plan("cpu", (cpu_facts(),), (able,), {}, read_facts(model_dir), data, request)


def run_mst(
    prepared: Prepared, model_dir: Path, made: Plan, request: TrainRequest, profiled: Any = None
) -> Clock:
    """Train with our loop, as a worker sets it up."""
    import torch

    from mst.training.batches import layout_of
    from mst.training.checkpoint import TrainState
    from mst.training.compilation import compile_layers, tensor_kind
    from mst.training.isolation import rows_stay_apart, sharing_obstacle
    from mst.training.loop import run
    from mst.training.session import logits_in, make_session

    model = load(model_dir, made.weights_dtype)
    cpu = torch.device("cpu")
    packing = rows_stay_apart(model, prepared.tokenizer.vocab_size, cpu)
    dtype = getattr(torch, made.compute_dtype)
    shares = made.prefix_sharing and not sharing_obstacle(
        model, prepared.tokenizer.vocab_size, cpu, dtype, made.max_length
    )
    clock = Clock()
    began = time.perf_counter()
    if made.compiled:
        reason = compile_layers(
            model, cpu, dtype,
            layout_of(packing, made.attention, compiled=True),
            tensor_kind(made, request, 1, shares),
            logits_in(model, cpu, made), False, cache_dir(),
        )  # fmt: skip
        if reason:
            raise SystemExit(f"not compiled: {reason}")
        clock.compile_seconds = time.perf_counter() - began
    batch, steps = made.per_device_train_batch_size, made.total_steps
    clock.count(rows_of_steps(prepared, batch, steps), batch)
    with tempfile.TemporaryDirectory() as checkpoints:
        session = make_session(
            model, cpu, packing, prepared.train.examples, (), prepared.tokenizer.pad_token_id,
            made, request, Path(checkpoints), clock, lambda: False, compiled=made.compiled,
            shares=shares,
        )  # fmt: skip
        with profiled or contextlib.nullcontext():
            run(session, TrainState())
    return clock


def run_trl(
    prepared: Prepared, model_dir: Path, dtype: str, batch: int, steps: int, packing: bool
) -> Clock:
    """Train with TRL's SFTTrainer, its gradient checkpointing off as ours is.

    With packing its blocks have MAX_LENGTH tokens, two a step; rows in one see each other, for
    TRL keeps them apart on GPUs alone.
    """
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = prepared.train.examples if packing else rows_of_steps(prepared, batch, steps)
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
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            ids = inputs["input_ids"]
            clock.tokens.append(int(ids.numel() if mask is None else mask.sum()))
            clock.labels.append(int((inputs["labels"] != -100).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, per_device_train_batch_size=2 if packing else batch,
            max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1,
            report_to=[], bf16=dtype == "bfloat16", gradient_checkpointing=False,
            save_strategy="no", use_cpu=True, packing=packing, completion_only_loss=True,
            max_length=MAX_LENGTH if packing else None, disable_tqdm=True,
            dataloader_pin_memory=False, weight_decay=0.0, seed=SEED,
        )  # fmt: skip
        trainer = InOrder(
            model=load(model_dir, dtype), args=config, train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(model_dir), callbacks=[Note()],
        )  # fmt: skip
        trainer.train()
    return clock


def product_rate(dtype: str) -> float:
    """Return the operations a second of one square product, the best of ten."""
    import torch

    size = 2048
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    best: float = min(times)
    return 2 * size**3 / best


def child(side: str, model_dir: Path, args: argparse.Namespace) -> None:
    """Run one trainer in this process and print what it measured."""
    import torch

    # All sides get the same threads, whatever the machine has.
    torch.set_num_threads(args.threads)
    dtype = "float32" if side == "reference" else args.dtype
    prepared = prepared_rows(model_dir, args.dataset)
    request = request_of(side, dtype, args.batch, args.steps)
    made = planned(request, prepared, model_dir)
    if args.profile:
        profile(prepared, model_dir, made, request, args.profile)
        return
    if side.startswith("trl"):
        clock = run_trl(
            prepared, model_dir, dtype, args.batch, args.steps, packing=side == "trl-packed"
        )
    else:
        clock = run_mst(prepared, model_dir, made, request)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = clock.ends[args.steps - 1] - clock.ends[WARM_UP - 1]
    tokens, labels = (sum(each[WARM_UP : args.steps]) for each in (clock.tokens, clock.labels))
    facts = read_facts(model_dir)
    work = model_work(facts, ("all-linear",))
    # As docs/time.md counts LoRA: a frozen weight costs 2 operations forward and 2 back.
    flop = 4 * work.body * tokens + 4 * work.head * labels
    flop += 2 * 3 * RANK * work.adapter_units * tokens
    found = {
        "tokens_per_second": tokens / seconds,
        "answer_tokens_per_second": labels / seconds,
        "mfu": flop / seconds / product_rate(dtype),
        "peak_rss_bytes": peak,
        "compile_seconds": clock.compile_seconds,
        "losses": clock.losses[: args.steps],
    }
    print(json.dumps(found), flush=True)


def prepared_rows(model_dir: Path, dataset: str | None) -> Prepared:
    """Return the first rows of the data set, those beyond MAX_LENGTH cut."""
    request = TrainRequest(
        val_size=0.0, max_length=MAX_LENGTH, truncation_strategy="right", model=str(model_dir)
    )
    source = (f"{dataset}#{ROWS}",) if dataset else demo_data()[:1]
    return prepare(request, source, model_dir, None)


def profile(
    prepared: Prepared, model_dir: Path, made: Plan, request: TrainRequest, trace: str
) -> None:
    """Run the steps under torch's profiler; print its table and write its trace."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kept = profiler(activities=[ProfilerActivity.CPU])
    run_mst(prepared, model_dir, made, request, kept)
    print(kept.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    kept.export_chrome_trace(trace)


def measure(side: str, model_dir: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a fresh process, with the environment that each would have in use."""
    from mst_backends.cpu import mst_environment
    from mst_backends.cpu import read_facts as cpu_facts

    environment = os.environ | offline_environment()
    if not side.startswith("trl"):
        environment |= {**mst_environment((cpu_facts(),)), **heap_environment("roomy")}
    environment |= {"OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, "--child", side, "--directory", str(model_dir)]
    for name in ("dtype", "batch", "steps", "threads", "dataset", "profile"):
        value = getattr(args, name)
        command += [f"--{name}", str(value)] if value is not None else []
    output = None if args.profile else subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=output, text=True, check=True)
    found: dict[str, Any] = {} if args.profile else json.loads(done.stdout.splitlines()[-1])
    return found


def busy_share(seconds: float = 2.0) -> float:
    """Return the share of this machine's cores that others use now."""

    def read() -> tuple[int, int]:
        values = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return sum(values), values[3] + values[4]

    total, idle = read()
    time.sleep(seconds)
    after, rest = read()
    return 1 - (rest - idle) / max(1, after - total)


def case(kind: str, sides: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return one case: medians of all sides, and the medians of ratios, round by round."""
    with tempfile.TemporaryDirectory() as place:
        directory = model_directory(kind, Path(place))
        if args.profile:
            measure("mst", directory, args)
            raise SystemExit(0)
        busy = busy_share()
        reference = measure("reference", directory, args)["losses"]
        measure("mst", directory, args)  # kernels are kept from here on
        rounds = [
            {side: measure(side, directory, args) for side in sides} for _ in range(args.pairs)
        ]

    def median(side: str, name: str) -> float:
        found: float = statistics.median(one[side][name] for one in rounds)
        return round(found, 4)

    def ratio(name: str, side: str) -> float:
        found: float = statistics.median(one["mst"][name] / one[side][name] for one in rounds)
        return round(found, 3)

    line: dict[str, Any] = {
        "case": f"{kind} lora r={RANK} all-linear {args.dtype} batch {args.batch}",
        "rows": Path(args.dataset).name if args.dataset else "banking77",
        "pairs": args.pairs,
        "steps": args.steps,
        "threads": args.threads,
        "busy_share_before": round(busy, 3),
    }
    for name in ("tokens_per_second", "answer_tokens_per_second", "mfu", "peak_rss_bytes"):
        line[name] = {side: median(side, name) for side in sides}
    line["compile_seconds_with_kept_kernels"] = median("mst", "compile_seconds")
    for side in sides[1:]:
        # Packed rows are others in each step, and more of them; answers are what both learn.
        speed = "answer_tokens_per_second" if side == "trl-packed" else "tokens_per_second"
        line[f"{speed}_ratio_to_{side}"] = ratio(speed, side)
        line[f"peak_rss_ratio_to_{side}"] = ratio("peak_rss_bytes", side)
    for side in sides:
        if side != "trl-packed":
            pairs = zip(rounds[0][side]["losses"], reference, strict=True)
            off = max(abs(a - b) for a, b in pairs)
            line.setdefault("largest_loss_difference_to_float32", {})[side] = round(off, 5)
    return line


def main() -> None:
    """Print each case, or run as a child."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["llama"], choices=["llama", *SHAPES])
    parser.add_argument("--dataset", help="rows in any format; default the demo's")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.directory, args)
        return
    for kind in args.model:
        print(json.dumps(case(kind, args.sides, args)), flush=True)


if __name__ == "__main__":
    main()
