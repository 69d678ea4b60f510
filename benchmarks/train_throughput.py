"""Tokens a second, peak memory and losses beside other trainers: same rows, model and adapters.

`python -m benchmarks.train_throughput --dataset ROWS [--model llama qwen2 gemma3_text]` prints one
JSON line a case; needs the `bench` extra. In each of `--pairs` rounds all sides take turns, each in
a process of its own and each round beginning with another, so that a machine whose speed drifts is
fair to them; a ratio is the median over the rounds. Sides: mst with compiled layers and without,
the same on NF4 weights, TRL as it comes and with packing, LLaMA-Factory likewise, ms-swift and
unsloth, which pack on GPUs alone; the last three where `--llamafactory PYTHON`, `--ms-swift`
or `--unsloth` names the interpreter of their environment. Float32 runs of mst with plain layers, on
NF4 weights where sides are, give the losses that bfloat16's are held against.

The model is SmolLM2-135M for llama; for others random weights of about its size. MFU is the model's
products over what one product of 2,048 squared reached in the same process. `--profile FILE` runs
the first of `--sides` once under torch's profiler instead, which must be of mst, prints where the
time of the steps after the warm-up goes, and writes a trace for a browser. A busy machine is
refused; `--busy-ok` marks the lines instead.

`--cases even rows8 length8` are made-up rows of one length, 2,048 tokens a step in each case, so
that what a step costs whatever its size weighs the same. `rows8` is a set of eight times the rows:
as many steps of the same micro-batch, which arithmetic gives the same tokens a second. `length8`
has rows eight times as long, an eighth of them a step: arithmetic gives tokens a second in inverse
proportion to a token's operations, of which attention's grow with the length. The last line has
both beside what was measured, and whether the two are within a tenth: by the clock, on one thread
by processor time, which counts on a busy machine too. These cases have no float32 run: random
tokens teach nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.train_sides import PACKED, PEERS, SIDES, measure, operations, tool
from benchmarks.train_task import RANK, SEED, WARM_UP, Task
from mst.cache import cache_dir
from mst.model.facts import read_facts
from mst.model.gguf import convert
from mst.model.locate import default_model
from mst.step_work import model_work

# What others may use of the machine's cores before it counts as busy.
QUIET = 0.05
# Of each made-up case: rows a step, tokens of each, and how many times the steps that are timed.
MADE_UP = {"even": (16, 128, 1), "rows8": (16, 128, 8), "length8": (2, 1024, 1)}
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


def busy_share(seconds: float = 2.0) -> float:
    """Return the share of this machine's cores that others use now."""

    def read() -> tuple[int, int]:
        values = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return sum(values), values[3] + values[4]

    total, idle = read()
    time.sleep(seconds)
    after, rest = read()
    return 1 - (rest - idle) / max(1, after - total)


def quiet_or_leave(allowed: bool) -> float:
    """Return how busy the machine is; leave where that is too much and not allowed."""
    found = busy_share()
    if found > QUIET and not allowed:
        raise SystemExit(
            f"others use {found:.0%} of this machine's cores (load average"
            f" {os.getloadavg()[0]:.2f}), which makes times worthless. Wait, or pass --busy-ok to"
            " measure and mark the lines."
        )
    return found


def rounds_of(
    sides: Sequence[str], directory: Path, task: Task, args: argparse.Namespace
) -> tuple[list[dict[str, dict[str, Any]]], list[float]]:
    """Return what was measured of each side in each round, and how busy the machine was before."""
    found, busy = [], []
    for number in range(args.pairs):
        turn = number % len(sides)
        busy.append(quiet_or_leave(args.busy_ok))
        taken = {
            side: measure(side, directory, task, interpreter(side, args))
            for side in (*sides[turn:], *sides[:turn])
        }
        found.append({side: taken[side] for side in sides})
    return found, busy


def interpreter(side: str, args: argparse.Namespace) -> str:
    """Return the interpreter of a peer's environment, "" for other sides."""
    return str(getattr(args, tool(side).replace("-", "_"))) if side in PEERS else ""


def case(kind: str, name: str, sides: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return one case: medians of all sides, and the medians of ratios, round by round."""
    batch, length, times = MADE_UP.get(name, (args.batch, None, 1))
    steps = WARM_UP + times * (args.steps - WARM_UP)
    task = Task(args.dataset, args.dtype, batch, length, steps, args.threads)
    with tempfile.TemporaryDirectory() as place:
        directory = model_directory(kind, Path(place))
        if args.profile:
            measure(sides[0], directory, task, trace=args.profile)
            raise SystemExit(0)
        names = {"reference-nf4" if "nf4" in side else "reference" for side in sides}
        if length:
            names = set()
        references = {name: measure(name, directory, task)["losses"] for name in names}
        for side in sides:
            if side in ("mst", "mst-nf4"):
                measure(side, directory, replace(task, steps=3))  # kernels are kept from here on
        rounds, busy = rounds_of(sides, directory, task, args)
        work = arithmetic(directory, task) if length else {}
    line: dict[str, Any] = {
        "case": f"{kind} lora r={RANK} all-linear {args.dtype} batch {batch}",
        "rows": f"{name}: {batch} x {length} made up" if length else _rows(args),
        "pairs": args.pairs,
        "steps": steps,
        "threads": args.threads,
        "busy_share_before": round(max(busy), 3),
        "load_average": round(os.getloadavg()[0], 2),
        "busy": max(busy) > QUIET,
    }
    return line | work | summed_up(rounds, references, sides)


def _rows(args: argparse.Namespace) -> str:
    return Path(args.dataset).name if args.dataset else "banking77"


def summed_up(
    rounds: Sequence[dict[str, dict[str, Any]]],
    references: Mapping[str, Sequence[float]],
    sides: Sequence[str],
) -> dict[str, Any]:
    """Return the medians of all sides, those of their ratios, and how far the losses are off.

    Args:
        rounds: what was measured of each side.
        references: losses of the float32 runs, "reference" and "reference-nf4"; none where nothing
            is held against them.
        sides: the first is what the others are held against.
    """

    def ratio(name: str, side: str) -> float:
        values = (one[sides[0]][name] / one[side][name] for one in rounds)
        return round(float(statistics.median(values)), 3)

    line: dict[str, Any] = {}
    names = (
        "tokens_per_second", "answer_tokens_per_second", "step_seconds", "mfu", "product_tflops",
        "peak_rss_bytes", "compile_seconds",
    )  # fmt: skip
    for name in names:
        line[name] = {
            side: round(float(statistics.median(one[side][name] for one in rounds)), 4)
            for side in sides
        }
    own = "tokens_per_processor_second"  # of mst alone
    line[own] = {
        side: round(float(statistics.median(one[side][own] for one in rounds)), 4)
        for side in sides
        if rounds[0][side].get(own)
    }
    for side in sides[1:]:
        # Packed rows are others in each step, and more of them; answers are what both learn.
        speed = "answer_tokens_per_second" if side in PACKED else "tokens_per_second"
        line[f"{speed}_ratio_to_{side}"] = ratio(speed, side)
        line[f"peak_rss_ratio_to_{side}"] = ratio("peak_rss_bytes", side)
    off: dict[str, float] = {}
    for side in sides:
        known = references.get("reference-nf4" if "nf4" in side else "reference")
        if known is not None and side not in PACKED:
            pairs = zip(rounds[0][side]["losses"], known, strict=True)
            off[side] = round(max(abs(a - b) for a, b in pairs), 5)
    line |= {"largest_loss_difference_to_float32": off} if off else {}
    versions = {side: rounds[0][side]["version"] for side in sides if rounds[0][side]["version"]}
    return line | ({"versions": versions} if versions else {})


def arithmetic(directory: Path, task: Task) -> dict[str, Any]:
    """Return a step's operations in made-up rows, in products and in attention.

    Attention needs half the square of a row, forward once and 2.5 times back (Dao 2023,
    "FlashAttention-2", section 2.3).
    """
    length = task.length or 0
    tokens = task.batch * length
    work = model_work(read_facts(directory), ("all-linear",))
    return {
        "tokens_a_step": tokens,
        "products_flop": operations(directory, tokens, tokens // 4),
        "attention_flop": 4 * 3.5 * (length / 2) * work.attention * tokens,
    }


def scaling(lines: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
    """Return tokens a second over those of the first made-up case: by arithmetic, and measured.

    Arithmetic has all operations take as long as each other.
    """
    first = lines[0]

    def operations_a_token(line: dict[str, Any]) -> float:
        return float(line["products_flop"] + line["attention_flop"]) / float(line["tokens_a_step"])

    def compared(line: dict[str, Any], side: str) -> dict[str, Any]:
        own = "tokens_per_processor_second"
        rate = own if line["threads"] == 1 and side in line[own] else "tokens_per_second"
        measured = float(line[rate][side] / first[rate][side])
        expected = operations_a_token(first) / operations_a_token(line)
        return {
            "measured": round(measured, 3),
            "by": rate,
            "over_arithmetic": round(measured / expected, 3),
            "within_a_tenth": abs(measured / expected - 1) <= 0.1,
        }

    return {
        "scaling": {
            line["rows"]: {
                "arithmetic": round(operations_a_token(first) / operations_a_token(line), 3),
                **{side: compared(line, side) for side in sides},
            }
            for line in lines[1:]
        }
    }


def parsed() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["llama"], choices=["llama", *SHAPES])
    parser.add_argument("--dataset", help="rows in any format; default the demo's")
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    parser.add_argument("--cases", nargs="+", default=["rows"], choices=["rows", *MADE_UP])
    for peer in dict.fromkeys(map(tool, PEERS)):
        parser.add_argument(f"--{peer}", metavar="PYTHON", help="of this peer's environment")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy-ok", action="store_true", help="mark a busy machine's lines")
    parser.add_argument("--profile", metavar="FILE")
    args = parser.parse_args()
    if args.sides is None:
        given = [side for side in PEERS if interpreter(side, args) != "None"]
        args.sides = ["mst", "mst-plain", "trl", "trl-packed", *given]
    for side in args.sides:
        if interpreter(side, args) == "None":
            parser.error(f"--sides {side} needs --{tool(side)} PYTHON, of its environment")
    if args.profile and not args.sides[0].startswith("mst"):
        parser.error(f"--profile runs the first of --sides, of mst; {args.sides[0]} is none")
    return args


def main() -> None:
    """Print each case, then how the made-up ones compare."""
    args = parsed()
    for kind in args.model:
        lines = []
        for name in args.cases:
            line = case(kind, name, args.sides, args)
            print(json.dumps(line), flush=True)
            lines += [line] if name in MADE_UP else []
        if len(lines) > 1:
            print(json.dumps(scaling(lines, args.sides)), flush=True)


if __name__ == "__main__":
    main()
