"""Every Python example in docs/ runs: a file's blocks in order, in one interpreter of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def script(document: Path) -> str:
    """Return a document's Python blocks; each stands at its own line, for the traceback."""
    text = document.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for index, line in enumerate(block.group(1).splitlines()):
            lines[first + index] = line
    return "\n".join(lines) + "\n"


# The examples of hooks come from mst.hookspecs, whose own tests run them.
DOCUMENTS = [
    each.name
    for each in sorted(DOCS.glob("*.md"))
    if each.name != "hooks.md" and BLOCK.search(each.read_text())
]


def test_there_are_examples() -> None:
    assert "python.md" in DOCUMENTS


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_examples_run(name: str, tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "my-model").symlink_to(tiny_model)
    (tmp_path / "records.jsonl").symlink_to(chat_rows)
    (tmp_path / name).write_text(script(DOCS / name), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", name],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
