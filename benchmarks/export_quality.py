"""What each export format costs and keeps: the demo's run, exported as a user does.

`python benchmarks/export_quality.py [--run RUN] [--format gptq gptq:rtn gguf:8 …]` tunes the demo's
model with `mst train` unless a run is given, exports it once a format, each in a command of its
own, and prints one JSON line a format: bytes, seconds, peak memory of the largest process, and
what the comparison found on the run's held-out rows, beside plain rounding to the same scheme. The
merge, which all share, is made before and not timed. `--text FILE` adds the perplexity on plain
text, in windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMATS = (
    "merged", "gptq", "gptq:rtn", "awq", "awq:rtn", "compressed-tensors",
    "compressed-tensors:rtn", "turbomind", "gguf:4", "gguf:8", "gguf:16",
)  # fmt: skip
_TEXT_TOKENS, _WINDOW = 16_384, 512


def mst(*arguments: str) -> int:
    """Run a command of mst, its output on standard error, and return its exit code."""
    command = [sys.executable, "-m", "mst", *arguments]
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode


def exported(run: Path, name: str, place: Path, more: Sequence[str]) -> dict[str, Any]:
    """Export one format, with the method or the bits behind its colon, and return its line."""
    format_name, _, which = name.partition(":")
    options = ["--bits" if which.isdigit() else "--method", which] if which else []
    options += [] if format_name in ("merged", "gguf") else list(more)
    began = time.perf_counter()
    code = mst("export", str(run), "--format", format_name, "--output-dir", str(place), *options)
    seconds = time.perf_counter() - began
    directory = place / format_name
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    line: dict[str, Any] = {
        "format": name,
        "scheme": manifest["scheme"],
        "status": manifest["status"],
        "exit_code": code,
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "seconds": round(seconds, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    quality = manifest["quality"]
    if quality is None:
        return line | {"faults": manifest["faults"][:3]}
    figures = (
        "perplexity", "perplexity_ratio", "mean_kl", "agreement", "trained_tokens",
        "trained_ratio", "trained_kl",
    )  # fmt: skip
    line |= {each: round(quality["model"][each], 5) for each in figures}
    if quality["rounding"] is not None:
        line |= {
            f"rounding_{each}": round(quality["rounding"][each], 5)
            for each in ("perplexity_ratio", "mean_kl", "trained_ratio", "trained_kl")
        }
    if quality["answers"] is not None:
        line |= {each: quality["answers"][each] for each in ("right", "trained_right", "asked")}
    return line


def text_perplexity(directory: Path, merged: Path, text: Path) -> float:
    """Return an artefact's perplexity on plain text over the merged model's.

    Args:
        directory: of the artefact, named as its format.
        merged: of the merged model.
        text: file.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mst.data.encode import Example
    from mst.data.tokens import load_tokenizer
    from mst.export.figures import distance, reference
    from mst.export.gate import put_weights
    from mst.registry import load as load_plugins

    ids = load_tokenizer(merged).encode(text.read_text(encoding="utf-8")[:200_000]).ids
    ids = ids[:_TEXT_TOKENS]
    windows = [array("i", ids[i : i + _WINDOW]) for i in range(0, len(ids), _WINDOW)]
    rows = [Example(each, each, None) for each in windows]  # type: ignore[arg-type]
    load: Any = AutoModelForCausalLM.from_pretrained
    trained, candidate = (load(merged, dtype=torch.float32).eval() for _ in range(2))
    relay = load_plugins().exports[directory.name]
    put_weights(candidate, relay.mst_export_weights(directory=str(directory)))
    return distance(reference(trained, rows), candidate).perplexity_ratio


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", help="a finished run; default the demo's, tuned now")
    parser.add_argument("--format", nargs="+", default=list(FORMATS))
    parser.add_argument("--group-size", default="32")
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        run = Path(arguments.run) if arguments.run else place / "run"
        if not arguments.run and mst("train", "--device", "cpu", "--output-dir", str(run)):
            raise SystemExit("the demo's run failed")
        # Makes the merge that the others share.
        exported(run, "merged", place / "shared", ())
        for number, name in enumerate(arguments.format):
            own = place / str(number)
            own.mkdir()
            (own / ".merged").symlink_to(place / "shared/.merged")
            line = exported(run, name, own, ("--group-size", arguments.group_size))
            if arguments.text is not None and name != "merged":
                found = own / name.partition(":")[0]
                ratio = text_perplexity(found, place / "shared/merged", arguments.text)
                line["text_perplexity_ratio"] = round(ratio, 4)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
