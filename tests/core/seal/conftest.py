"""A key, and rows that are encrypted with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mst.seal.container.output import whole_file
from mst.seal.container.writer import encrypt
from mst.seal.keys.key_file import make_key_file, read_key_file
from mst.seal.keys.wrapping import KeyFileWay

SEGMENT_BYTES = 4096


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    make_key_file(path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """120 rows with a blank line among them, in ten segments' length."""
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"question {number} " + "w" * (number * 5), "response": "yes"})
        for number in range(120)
    ]
    path.write_text("\n".join([*lines[:7], "  ", *lines[7:]]) + "\n")
    return path


@pytest.fixture
def sealed(rows: Path, key_file: Path) -> Path:
    path = rows.with_name("rows.jsonl.mst")
    with rows.open("rb") as source, whole_file(path) as target:
        ways = (KeyFileWay(read_key_file(key_file)),)
        encrypt(source, target, ".jsonl", ways, segment_bytes=SEGMENT_BYTES)
    return path
