"""Growth of the memory of a worker with the size of the file that it streams.

`python benchmarks/streaming_memory.py [--gigabytes 0.1 1]` writes files of random words, trains a
tiny model for a few steps on each with `--streaming`, and prints one JSON line a size: the highest
resident set of the command and its worker, and the growth over the first size, which should be the
smallest. The index is 8 bytes a row in each of the two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 20
WORDS = ("balance", "card", "cash", "fee", "limit", "loan", "pin", "rate", "transfer", "the", "of")


def write_rows(path: Path, size: int) -> int:
    """Write at least `size` bytes of conversations of about 1 kB; return how many."""
    draw = random.Random(0)
    answers = [" ".join(draw.choices(WORDS, k=150)) for _ in range(1000)]
    count = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            turns = [
                {"role": "user", "content": f"question {count}"},
                {"role": "assistant", "content": answers[draw.randrange(1000)]},
            ]
            written += file.write(json.dumps({"messages": turns}) + "\n")
            count += 1
    return count


def make_model(path: Path, tokenizer: Path) -> None:
    """Write a Llama of two layers with random weights."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=6400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            bos_token_id=1, eos_token_id=2,
        )
    ).save_pretrained(path)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, path)


def train(model: Path, data: Path, run: Path) -> dict[str, Any]:
    """Run `mst train --streaming`; return its seconds and its processes' highest resident set."""
    options = {
        "model": model, "dataset": data, "output-dir": run, "device": "cpu", "max-steps": STEPS,
        "per-device-train-batch-size": 4, "gradient-accumulation-steps": 1, "max-length": 512,
        "threads": 1, "learning-rate": 0.001,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    began = time.perf_counter()
    command = [sys.executable, "-m", "mst", "train", "--streaming", *flags]
    _, status, usage = os.wait4(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid, 0)
    assert status == 0
    seconds = time.perf_counter() - began
    # Of the command or of the worker that it waited for, whichever was larger.
    return {"seconds": round(seconds, 1), "peak_rss_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    """Print each size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0])
    args = parser.parse_args()
    tokenizer = Path(__file__).parent.parent / "tests/data/tokenizers/minimind"
    first: int | None = None
    with tempfile.TemporaryDirectory() as directory:
        model, data = Path(directory) / "model", Path(directory) / "rows.jsonl"
        make_model(model, tokenizer)
        for gigabytes in sorted(args.gigabytes):
            rows = write_rows(data, int(gigabytes * 1e9))
            size = data.stat().st_size
            found = train(model, data, Path(directory) / f"run-{gigabytes}")
            data.unlink()
            first = first or found["peak_rss_bytes"]
            print(
                json.dumps(
                    {
                        "case": f"--streaming, {STEPS} steps of 4 rows, a Llama of 2 layers",
                        "file_bytes": size,
                        "rows": rows,
                        "index_bytes": 8 * rows,
                        **found,
                        "growth_bytes": found["peak_rss_bytes"] - first,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
