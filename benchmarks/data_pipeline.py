"""Rows a second from parsed conversations to packed ids and labels, beside TRL's SFTTrainer.

`python benchmarks/data_pipeline.py [--rows 10000] [--pairs 3] [--dataset FILE] [--processes 1 2]`
prints one JSON line a case; needs the `bench` extra. Both get the same rows, tokenizer and chat
template, mask all but the assistant's turns, and pack blocks of `--max-length` tokens; TRL in the
way that its trainer prepares a data set, with the training template that it has for the model. They
take turns, each run in a process of its own; the ratio is the median over the pairs. "Processes"
are TRL's `dataset_num_proc`, and threads of the tokenizer on our side. That both found the same
tokens, and the same that carry loss, is checked; but TRL also learns the line break after each end
of turn, when the model has stopped already. Rows have one answer each: with several, TRL's training
template for Qwen3 gives other tokens than the model's own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from mst.data.formats import read
from mst.data.rows import Row
from mst.demo import demo_data

TOKENIZER = Path(__file__).parent.parent / "tests/data/tokenizers/qwen3"
SEED = 42


def taken(dataset: str, count: int) -> list[Row]:
    """Return `count` rows of a file, from the start again where it has fewer."""
    return list(islice(cycle(read([dataset]).rows), count))


def model_directory(parent: Path) -> Path:
    """Make a directory with Qwen3's tokenizer and a chat template that TRL knows."""
    import trl

    directory = parent / "model"
    directory.mkdir()
    with gzip.open(TOKENIZER / "tokenizer.json.gz") as packed:
        (directory / "tokenizer.json").write_bytes(packed.read())
    shutil.copy(TOKENIZER / "tokenizer_config.json", directory)
    source = Path(trl.__file__).parent / "chat_templates/qwen3.jinja"
    shutil.copy(source, directory / "chat_template.jinja")
    return directory


def clock() -> tuple[float, float]:
    """Return the time, and the CPU seconds of this process and of those that it has ended."""
    return time.perf_counter(), sum(os.times()[:4])


def facts(
    began: tuple[float, float], ended: tuple[float, float], blocks: list[tuple[Any, Any]]
) -> dict[str, Any]:
    """Return what one side reports of its blocks, each as (ids, labels)."""
    counts = [(len(ids), sum(label != -100 for label in labels)) for ids, labels in blocks]
    return {
        "seconds": ended[0] - began[0],
        "cpu_seconds": ended[1] - began[1],
        "blocks": len(counts),
        "tokens": sum(tokens for tokens, _ in counts),
        "label_tokens": sum(labels for _, labels in counts),
        # In any order, since each side packs in its own.
        "ids": sum(sum(ids) for ids, _ in blocks),
    }


def run_mst(rows: list[Row], directory: Path, max_length: int) -> dict[str, Any]:
    """Encode and pack with our pipeline."""
    from array import array

    from mst.data.encode import encode
    from mst.data.template import load_template
    from mst.data.tokens import load_tokenizer
    from mst.training.order import epoch_blocks, row_sizes

    tokenizer, template = load_tokenizer(directory), load_template(directory)
    began = clock()
    examples = encode(rows, tokenizer, template, max_length).examples
    blocks = []
    for block in epoch_blocks(row_sizes(examples, max_length), SEED, 0):
        ids, labels = array("i"), array("i")
        for row in block:
            ids += examples[row].input_ids
            labels += examples[row].labels
        blocks.append((ids, labels))
    return facts(began, clock(), blocks)


def run_trl(rows: list[Row], directory: Path, max_length: int, processes: int) -> dict[str, Any]:
    """Prepare the same rows as SFTTrainer does; the model is tiny and takes no part."""
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    data = Dataset.from_list(
        [
            {"messages": [{"role": m.role, "content": m.content} for m in each.messages]}
            for each in rows
        ]
    )
    times: list[tuple[float, float]] = []

    class Timed(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            times.append(clock())
            prepared = super()._prepare_dataset(*args, **kwargs)
            times.append(clock())
            return prepared

    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, max_length=max_length, packing=True, assistant_only_loss=True,
            dataset_num_proc=processes if processes > 1 else None, use_cpu=True, bf16=False,
            report_to=[], disable_tqdm=True, seed=SEED,
        )  # fmt: skip
        trainer = Timed(model=model, args=config, train_dataset=data, processing_class=tokenizer)
        prepared = trainer.train_dataset
    return facts(
        times[0], times[1], list(zip(prepared["input_ids"], prepared["labels"], strict=True))
    )


def measure(side: str, args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Run one side in a fresh process, without files that an earlier run could have left."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "RAYON_NUM_THREADS": str(processes),
            "TOKENIZERS_PARALLELISM": "true" if side == "mst" and processes > 1 else "false",
        }  # fmt: skip
        command = [
            sys.executable, __file__, "--child", side, "--rows", str(args.rows),
            "--dataset", args.dataset, "--max-length", str(args.max_length),
            "--processes", str(processes),
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def case(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Return one case: medians of both sides, and the median of the ratios, pair by pair."""
    pairs = [
        (measure("mst", args, processes), measure("trl", args, processes))
        for _ in range(args.pairs)
    ]
    rows = taken(args.dataset, args.rows)
    turns = sum(message.role == "assistant" for each in rows for message in each.messages)
    for ours, theirs in pairs:
        for name in ("tokens", "ids"):
            assert ours[name] == theirs[name], f"{name} differ: {ours[name]}, {theirs[name]}"
        assert ours["label_tokens"] + turns == theirs["label_tokens"]
    ours, theirs = pairs[0]
    mine = [one["seconds"] for one, _ in pairs]
    other = [one["seconds"] for _, one in pairs]
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return {
        "case": f"{args.rows} rows of {Path(args.dataset).name}, template qwen3",
        "processes": processes,
        "pairs": len(pairs),
        "max_length": args.max_length,
        "tokens": ours["tokens"],
        "label_tokens_mst": ours["label_tokens"],
        "label_tokens_trl": theirs["label_tokens"],
        "blocks_mst": ours["blocks"],
        "blocks_trl": theirs["blocks"],
        "rows_per_second_mst": round(args.rows / statistics.median(mine)),
        "rows_per_second_trl": round(args.rows / statistics.median(other)),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(each, 2) for each in ratios],
        "cpu_ratio": round(
            statistics.median(b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs), 2
        ),
    }


def about() -> dict[str, Any]:
    """Return what was measured, and where."""
    from importlib.metadata import version

    names = ("trl", "datasets", "transformers", "tokenizers", "jinja2")
    return {
        "versions": {"python": platform.python_version()} | {each: version(each) for each in names},
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Print each case, or run as a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dataset", default=demo_data()[0], metavar="FILE")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--child", choices=["mst", "trl"])
    args = parser.parse_args()
    if args.child:
        rows = taken(args.dataset, args.rows)
        with tempfile.TemporaryDirectory() as parent:
            directory = model_directory(Path(parent))
            if args.child == "mst":
                found = run_mst(rows, directory, args.max_length)
            else:
                found = run_trl(rows, directory, args.max_length, args.processes[0])
        print(json.dumps(found), flush=True)
        return
    print(json.dumps(about()), flush=True)
    for processes in args.processes:
        print(json.dumps(case(args, processes)), flush=True)


if __name__ == "__main__":
    main()
