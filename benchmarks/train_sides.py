"""The trainers that `benchmarks/train_throughput.py` compares, each run in a process of its own.

Every side gets the same rows in the same order, the same model and adapters of the same values. It
notes when each optimizer step ended, its loss, and the tokens that it had.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.step_profile import ProfiledClock, profiled, table
from benchmarks.train_task import (
    MAX_LENGTH,
    RANK,
    RATE,
    SEED,
    WARM_UP,
    Clock,
    Task,
    prepared_rows,
    product_rate,
    rows_of_steps,
)
from mst.bench.peers import driver_command, handed_over, peer_environment
from mst.cache import cache_dir
from mst.data.prepare import Prepared, data_facts
from mst.facts import Capabilities
from mst.launch import offline_environment
from mst.memory.runtime import heap_environment
from mst.model.facts import read_facts
from mst.plan import Plan
from mst.planner import plan
from mst.request import TrainRequest
from mst.step_work import model_work

PEERS = ("llamafactory", "llamafactory-packed", "ms-swift", "unsloth")
PACKED = ("trl-packed", "llamafactory-packed")
SIDES = ("mst", "mst-plain", "mst-nf4", "mst-nf4-plain", "trl", "trl-packed", *PEERS)


def request_of(side: str, task: Task) -> TrainRequest:
    """Return what a side of mst trains with."""
    plain = side not in ("mst", "mst-nf4")
    return TrainRequest(
        max_steps=task.steps, per_device_train_batch_size=task.batch,
        gradient_accumulation_steps=1, learning_rate=RATE, dtype=task.dtype, warmup_ratio=0.0,
        lr_scheduler_type="constant", tuner="qlora" if "nf4" in side else "lora", seed=SEED,
        save_steps=10**6, lora_rank=RANK, max_length=max(MAX_LENGTH, task.length or 0),
        torch_compile="off" if plain else "on", init_lora_weights="default",
        block_attention="off" if side.startswith("reference") else "auto",
    )  # fmt: skip


def load(model_dir: Path, dtype: str, quantization: str = "none") -> Any:
    """Return the model with fresh adapters, the same for all."""
    import torch

    from mst.training.adapters import load_model, lora_config, prepare_model

    cpu = torch.device("cpu")
    model = load_model(model_dir, dtype, "sdpa", cpu, quantization)
    torch.manual_seed(SEED)
    return prepare_model(model, lora_config(TrainRequest(lora_rank=RANK)))


def planned(request: TrainRequest, prepared: Prepared, model_dir: Path) -> Plan:
    """Return the plan of this machine's CPU."""
    from mst_backends.cpu import mst_capabilities
    from mst_backends.cpu import read_facts as cpu_facts

    able: Capabilities = mst_capabilities()
    data = data_facts(prepared)
    return plan("cpu", (cpu_facts(),), (able,), {}, read_facts(model_dir), data, request)


def run_mst(
    prepared: Prepared,
    model_dir: Path,
    made: Plan,
    request: TrainRequest,
    task: Task,
    clock: Clock | None = None,
) -> Clock:
    """Train with our loop, as a worker sets it up; return `clock`, or one of its own."""
    import torch

    from mst.training.block_attention import use_block_attention
    from mst.training.checkpoint import TrainState
    from mst.training.compilation import compile_layers
    from mst.training.isolation import rows_stay_apart, sharing_obstacle
    from mst.training.loop import run
    from mst.training.objectives import find_objective
    from mst.training.session import logits_in, make_session
    from mst.training.tensor_kind import compiled_layout, tensor_kind

    if made.block_attention:
        use_block_attention()
    model = load(model_dir, made.weights_dtype, made.quantization)
    cpu = torch.device("cpu")
    packing = rows_stay_apart(model, prepared.tokenizer.vocab_size, cpu)
    dtype = getattr(torch, made.compute_dtype)
    shares = made.prefix_sharing and not sharing_obstacle(
        model, prepared.tokenizer.vocab_size, cpu, dtype, made.max_length
    )
    clock = clock or Clock()
    began = time.perf_counter()
    layout = None
    if made.compiled:
        objective, rows = find_objective(request), prepared.train.examples
        layout = (
            compiled_layout(made, request, objective, rows, (), shares) if packing else "padded"
        )
        reason = compile_layers(
            model, cpu, dtype, layout,
            tensor_kind(made, request, objective, rows, layout, shares),
            logits_in(model, cpu, made), False, cache_dir(),
        )  # fmt: skip
        if reason:
            raise SystemExit(f"not compiled: {reason}")
    clock.compile_seconds = time.perf_counter() - began
    clock.count(rows_of_steps(prepared, task), task.batch)
    with tempfile.TemporaryDirectory() as checkpoints:
        session = make_session(
            model, cpu, made, request, packing=packing, train=prepared.train.examples,
            pad_token_id=prepared.tokenizer.pad_token_id, checkpoints=Path(checkpoints),
            reporter=clock, stop_asked=lambda: False, layout=layout, shares=shares,
        )  # fmt: skip
        run(session, TrainState())
    return clock


def run_peer(
    side: str, python: str, prepared: Prepared, model_dir: Path, task: Task
) -> tuple[Clock, dict[str, Any]]:
    """Train with another tool, as a row of `mst bench` does; return what it told of itself too.

    With packing TRL's blocks have MAX_LENGTH tokens, two a step; rows in one see each other, for
    TRL keeps them apart on GPUs alone.

    Args:
        side: "trl", "trl-packed" or one of `PEERS`.
        python: the interpreter of its environment.
        prepared: the rows.
        model_dir: the model.
        task: what all sides do.
    """
    packing, name = side in PACKED, tool(side)
    rows = prepared.train.examples if packing else rows_of_steps(prepared, task)
    with tempfile.TemporaryDirectory() as place:
        load(model_dir, task.dtype).save_pretrained(f"{place}/adapter")
        job = {
            "model": str(model_dir), "adapter": f"{place}/adapter", "place": place,
            "result": f"{place}/peer.json", "dtype": task.dtype, "attention": "sdpa",
            "device": "cpu", "threads": task.threads, "batch": 2 if packing else task.batch,
            "accumulation": 1, "steps": task.steps, "checkpointing": False, "rate": RATE,
            "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "betas": [0.9, 0.999],
            "epsilon": 1e-8, "max_grad_norm": 1.0, "seed": SEED, "packing": packing,
            "max_length": max(MAX_LENGTH, task.length or 0),
            "rows": [[list(each.input_ids), list(each.labels)] for each in rows],
        }  # fmt: skip
        handle = handed_over(job)
        subprocess.run(
            driver_command(name, python or sys.executable, handle), pass_fds=(handle,), check=True,
            env=peer_environment(os.environ, Path(place), task.threads)
            | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        os.close(handle)
        told: dict[str, Any] = json.loads(Path(place, "peer.json").read_text(encoding="utf-8"))
    clock = Clock()
    clock.losses, clock.ends = told["losses"], told["ends"]
    clock.tokens, clock.labels = told["tokens"], told["labels"]
    if not packing:
        clock.count(rows, task.batch)
    told["version"] = f"{name} {told['versions'][name]}"
    return clock, told


def tool(side: str) -> str:
    """Return the peer that a side runs."""
    return side.removesuffix("-packed")


def run_side(side: str, model_dir: Path, task: Task, python: str, trace: str) -> dict[str, Any]:
    """Run one trainer in this process; return what was measured.

    Args:
        side: one of `SIDES`, or "reference" or "reference-nf4": float32, layers as they are.
        model_dir: the model.
        task: what all sides do.
        python: interpreter of a peer's environment.
        trace: file for the trace of torch's profiler, whose table is printed; "" for no profile.
    """
    import torch

    # All sides get the same threads, whatever the machine has.
    torch.set_num_threads(task.threads)
    task = replace(task, dtype="float32") if side.startswith("reference") else task
    prepared = prepared_rows(model_dir, task)
    told: dict[str, Any] = {}
    if side in PEERS or side.startswith("trl"):
        clock, told = run_peer(side, python, prepared, model_dir, task)
    else:
        request = request_of(side, task)
        made = planned(request, prepared, model_dir)
        if trace:
            profile(prepared, model_dir, made, request, task, trace)
            return {}
        clock = run_mst(prepared, model_dir, made, request, task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = clock.ends[task.steps - 1] - clock.ends[WARM_UP - 1]
    own = clock.processor_ends
    processor_seconds = own[task.steps - 1] - own[WARM_UP - 1] if own else None
    tokens, labels = (sum(each[WARM_UP : task.steps]) for each in (clock.tokens, clock.labels))
    rate = product_rate(task.dtype)
    return {
        "tokens_per_second": tokens / seconds,
        "answer_tokens_per_second": labels / seconds,
        "tokens_per_processor_second": processor_seconds and tokens / processor_seconds,
        "step_seconds": seconds / (task.steps - WARM_UP),
        "mfu": operations(model_dir, tokens, labels) / seconds / rate,
        "product_tflops": rate / 1e12,
        "peak_rss_bytes": told.get("peak_memory_bytes", peak),
        "compile_seconds": clock.compile_seconds,
        "losses": clock.losses[: task.steps],
        "version": told.get("version", ""),
    }


def operations(model_dir: Path, tokens: float, labels: float) -> float:
    """Return what products with LoRA ask for, as docs/time.md counts them.

    A frozen weight costs 2 operations a token forward and 2 back.
    """
    work = model_work(read_facts(model_dir), ("all-linear",))
    return (
        4 * work.body * tokens + 4 * work.head * labels + 2 * 3 * RANK * work.adapter_units * tokens
    )


def profile(
    prepared: Prepared, model_dir: Path, made: Plan, request: TrainRequest, task: Task, trace: str
) -> None:
    """Run the steps under torch's profiler; print where their time goes and write its trace."""
    steps = task.steps - WARM_UP
    with profiled(Path(trace), steps) as kept:
        run_mst(prepared, model_dir, made, request, task, ProfiledClock(kept))
    print(table(kept.events(), read_facts(model_dir).vocab_size, steps), end="\n\n")
    print(kept.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def measure(
    side: str, model_dir: Path, task: Task, python: str = "", trace: str = ""
) -> dict[str, Any]:
    """Run one side in a fresh process, with the environment that each would have in use.

    Args: as `run_side`.
    """
    from mst_backends.cpu import mst_environment
    from mst_backends.cpu import read_facts as cpu_facts

    environment = os.environ | offline_environment()
    if side.startswith(("mst", "reference")):
        environment |= {**mst_environment((cpu_facts(),)), **heap_environment("roomy")}
    environment |= {"OMP_NUM_THREADS": str(task.threads)}
    job = json.dumps([side, str(model_dir), vars(task), python, trace])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_sides", job], env=environment,
        stdout=None if trace else subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = {} if trace else json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    _side, _model, _task, _python, _trace = json.loads(sys.argv[1])
    if _found := run_side(_side, Path(_model), Task(**_task), _python, _trace):
        print(json.dumps(_found), flush=True)
