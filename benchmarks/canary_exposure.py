"""How far a tuned model gives away rows that it saw once: exposure with and without privacy.

`python benchmarks/canary_exposure.py [--epsilon 8] [--epochs 3] [--canaries 16] [--rows 1200]`
puts canaries, rows with a random number, once each among the demo's rows, tunes the demo's model
with `mst train` without and with `--dp-epsilon`, and prints one JSON line a model, the untuned one
first. A canary's rank is that of its own number among random others, by the loss of the answer.

Exposure is log2(others + 1) - log2(rank): about 1 on average for a model that has never seen it,
and log2(others + 1) where every canary is the likeliest (Carlini et al. 2019, "The Secret Sharer",
definition 4, with the ranks of a sample).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mst import rundir
from mst.cache import cache_dir
from mst.data.encode import encode
from mst.data.rows import Message, Row
from mst.data.template import load_template
from mst.data.tokens import load_tokenizer
from mst.demo import demo_data
from mst.model.gguf import convert
from mst.model.locate import default_model

HELD_OUT = 60
PLACES = ("Harbour", "Mill", "Station", "Garden", "Bridge", "Castle", "Market", "Forest")


def canary(place: int, secret: str) -> dict[str, Any]:
    """Return a row that says a secret number."""
    where = f"{PLACES[place % len(PLACES)]} Street branch {place}"
    return {
        "messages": [
            {"role": "user", "content": f"What is the safe code of the {where}?"},
            {"role": "assistant", "content": f"The safe code is {secret}."},
        ]
    }


def numbers(count: int, seed: str) -> list[str]:
    """Return random numbers of eight digits in two groups."""
    drawn = random.Random(seed)
    return [f"{drawn.randrange(10**4):04d} {drawn.randrange(10**4):04d}" for _ in range(count)]


def tuned(directory: Path, name: str, data: Path, options: Sequence[str]) -> Path:
    """Return the directory of a run of `mst train`."""
    run = directory / name
    command = [
        sys.executable, "-m", "mst", "train", "--dataset", str(data), "--output-dir", str(run),
        "--val-dataset", f"{demo_data()[1]}#~{HELD_OUT}", "--label-accuracy", "off",
        "--device", "cpu", "--tuner", "lora", "--jail", "off", "--jail-reason", "benchmark",
        *options,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    return run


def losses(model: Any, rows: Sequence[dict[str, Any]], model_dir: Path) -> list[float]:
    """Return the summed loss of each row's answer, eight rows at a time."""
    import torch

    messages = [tuple(Message(**turn) for turn in each["messages"]) for each in rows]
    made = [Row(each, "canaries", number) for number, each in enumerate(messages, 1)]
    encoded = encode(made, load_tokenizer(model_dir), load_template(model_dir, None), None)
    found: list[float] = []
    for first in range(0, len(encoded.examples), 8):
        part = encoded.examples[first : first + 8]
        width = max(len(each.input_ids) for each in part)

        def padded(values: array[int], fill: int, width: int = width) -> list[int]:
            return [*values, *[fill] * (width - len(values))]

        ids = torch.tensor([padded(each.input_ids, 0) for each in part])
        labels = torch.tensor([padded(each.labels, -100) for each in part])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        found += each.sum(1).tolist()
    return found


def exposures(model: Any, arguments: argparse.Namespace, model_dir: Path) -> list[float]:
    """Return the exposure of each canary."""
    own = numbers(arguments.canaries, "own")
    others = numbers(arguments.others, "others")
    found = []
    for place, secret in enumerate(own):
        rows = [canary(place, each) for each in (secret, *others)]
        first, *rest = losses(model, rows, model_dir)
        rank = 1 + sum(each < first for each in rest)
        found.append(math.log2(len(rest) + 1) - math.log2(rank))
    return found


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--canaries", type=int, default=16)
    parser.add_argument("--others", type=int, default=127)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model_dir = convert(default_model().path, cache_dir())
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        lines = Path(demo_data()[0]).read_text(encoding="utf-8").splitlines()[: arguments.rows]
        secrets = numbers(arguments.canaries, "own")
        lines += [json.dumps(canary(number, each)) for number, each in enumerate(secrets)]
        random.Random(0).shuffle(lines)
        data = directory / "rows.jsonl"
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        shared = ["--num-train-epochs", str(arguments.epochs)]
        shared += ["--learning-rate", str(arguments.learning_rate)]
        private = ["--dp-epsilon", str(arguments.epsilon)]
        for name, options in (("untuned", None), ("lora", shared), ("dp", [*shared, *private])):
            base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
            line: dict[str, Any] = {"model": name, "epochs": arguments.epochs}
            if options is not None:
                run = tuned(directory, name, data, options)
                base = PeftModel.from_pretrained(base, str(run / "adapter"))
                manifest = rundir.read_manifest(run)
                line["held_out_loss"] = round(manifest.results["best_eval_loss"], 4)
                line["tokens_per_second"] = round(manifest.results["tokens_per_second"], 1)
                budget = manifest.privacy
                if budget is not None:
                    line |= {"epsilon": round(budget.epsilon, 3), "delta": budget.delta}
                    line |= {"noise_multiplier": round(budget.noise_multiplier, 4)}
            found = sorted(exposures(base.eval(), arguments, model_dir))
            line |= {
                "canaries": len(found),
                "exposure_mean": round(sum(found) / len(found), 3),
                "exposure_median": round(found[len(found) // 2], 3),
                "exposure_largest": round(found[-1], 3),
                "exposure_possible": round(math.log2(arguments.others + 1), 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
