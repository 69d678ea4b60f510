"""Write the table of architectures in docs/models.md: `python ci/make_model_table.py [--check]`.

It is made from the newest benchmarks/results/*-model-coverage.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = "docs/models.md"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
GROUPS = {"causal": "Text", "image-text": "Images and text (the text part is trained)"}


def newest(root: Path) -> Path:
    """Return the newest sweep's results."""
    return max((root / "benchmarks/results").glob("*-model-coverage.jsonl"))


def table(path: Path) -> str:
    """Return the document's generated part."""
    lines = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]
    found = lines.pop()["summary"]
    versions = ", ".join(f"{name} {each}" for name, each in found["versions"].items())
    text = [f"Run of {path.name[:10]}: {versions}. Source: [{path.name}](../{_place(path)}).", ""]
    for group, title in GROUPS.items():
        own = [each for each in lines if each["group"] == group]
        text += _group(title, own, found[group])
    return "\n".join(text).rstrip()


def _place(path: Path) -> str:
    return f"benchmarks/results/{path.name}"


def _group(title: str, lines: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    passed = [f"`{each['model_type']}`" for each in lines if each["passed"]]
    steps = found["steps"]
    return [
        f"### {title}",
        "",
        f"{found['passed']} of {found['architectures']} pass every step ({found['share']:.1%}).",
        "",
        _row(*steps),
        _row(*["---"] * len(steps)),
        _row(*(f"{share:.1%}" for share in steps.values())),
        "",
        f"Every step passes: {', '.join(passed)}.",
        "",
        _row("fails", "at", "reason"),
        _row("---", "---", "---"),
        *(_failure(each) for each in lines if not each["passed"]),
        "",
    ]


def _failure(line: dict[str, Any]) -> str:
    steps = line["steps"]
    bad = [name for name, why in steps.items() if why != "ok" and "not reached" not in why]
    return _row(f"`{line['model_type']}`", ", ".join(bad), f"`{steps[bad[0]][:160]}`")


def _row(*cells: str) -> str:
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def document(root: Path = ROOT) -> str:
    """Return what the document should be."""
    before, rest = (root / DOCUMENT).read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{table(newest(root))}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the document; with --check write nothing, and return 1 when it differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is fresh")
    check = parser.parse_args(argv).check
    path = root / DOCUMENT
    made = document(root)
    stale = path.read_text(encoding="utf-8") != made
    if stale and check:
        print(f"{DOCUMENT}: the table is stale. Run: python ci/make_model_table.py")
    elif stale:
        path.write_text(made, encoding="utf-8")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
