"""Runs LLaMA-Factory in the interpreter of its own environment; needs nothing of mst.

`PYTHON benchmarks/train_peers.py llamafactory JOB.json` is what `train_throughput.py` starts. The
job has the rows as token ids and labels, the model and fresh adapters; the last line that is
printed says when each step ended, the losses, this process's peak and the rate of one product.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def note() -> tuple[Any, dict[str, list[float]]]:
    """Return a callback of transformers' Trainer, and what it notes."""
    from transformers import TrainerCallback

    told: dict[str, list[float]] = {"ends": [], "losses": []}

    class Note(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            told["ends"].append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                told["losses"].append(float(logs["loss"]))

    return Note(), told


def data_set(rows: list[tuple[list[int], list[int]]]) -> Any:
    """Return rows of token ids and labels as a data set of `datasets`."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            for ids, labels in rows
        ]
    )


def packed(
    rows: list[tuple[list[int], list[int]]], length: int
) -> list[tuple[list[int], list[int]]]:
    """Return blocks as LLaMA-Factory's `packing` makes them of rows that are tokens already.

    Its own knapsack fills them; rows in one see each other, and the rest is 0 without a label.
    """
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for row in rows:
        by_length.setdefault(len(row[0]), []).append(row)
    blocks = []
    for lengths in greedy_knapsack([len(ids) for ids, _ in rows], length):
        taken = [by_length[each].pop() for each in lengths]
        gap = length + 1 - sum(lengths)
        ids = [token for row in taken for token in row[0]] + [0] * gap
        blocks.append((ids, [label for row in taken for label in row[1]] + [-100] * gap))
    return blocks


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers' Trainer is told, by its names."""
    return {
        "output_dir": f"{job['place']}/output", "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": 1, "max_steps": job["steps"],
        "learning_rate": job["rate"], "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
        "weight_decay": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": ["none"],
        "bf16": job["dtype"] == "bfloat16", "use_cpu": True, "seed": job["seed"],
        "disable_tqdm": True, "dataloader_pin_memory": False, "dataloader_num_workers": 0,
    }  # fmt: skip


def llamafactory(job: dict[str, Any]) -> dict[str, list[float]]:
    """Train with LLaMA-Factory, from rows that are tokens already."""
    from datasets import DatasetDict
    from llamafactory.train.tuner import run_exp

    tokens = f"{job['place']}/tokens"
    rows = packed(job["rows"], job["max_length"]) if job["packing"] else job["rows"]
    DatasetDict({"train": data_set(rows)}).save_to_disk(tokens)
    callback, told = note()
    given = arguments(job) | {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all",
        "lora_rank": job["rank"], "adapter_name_or_path": job["adapter"],
        "model_name_or_path": job["model"], "tokenized_path": tokens, "dataset": "tokens",
        "cutoff_len": job["max_length"], "disable_shuffling": True,
        "disable_gradient_checkpointing": True, "flash_attn": "sdpa",
    }  # fmt: skip
    run_exp(given, callbacks=[callback])
    for key, pad in (("tokens", 0), ("labels", -100)):
        sizes = [sum(each != pad for each in row[key == "labels"]) for row in rows]
        batches = range(0, len(sizes), job["batch"])
        told[key] = [sum(sizes[start : start + job["batch"]]) for start in batches]
    return told


TOOLS = {"llamafactory": llamafactory}


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
    return float(2 * size**3 / min(times))


def main() -> None:
    """Run the tool on the job, both as named."""
    name = sys.argv[1]
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "WANDB_DISABLED": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    import torch

    torch.set_num_threads(job["threads"])
    told: dict[str, Any] = dict(TOOLS[name](job))
    told["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told["product_rate"] = product_rate(job["dtype"])
    told["version"] = f"{name} {version(name)}"
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
