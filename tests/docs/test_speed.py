"""Each fast path of docs/speed.md has a switch of `mst train` and a test; in Chinese the same."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from mst.request import TrainRequest

ROOT = Path(__file__).resolve().parents[2]


def fast_paths(document: str = "speed.md") -> list[list[str]]:
    """Return the cells of the first table's rows: path, when it is used, switch, test."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    table = text[text.index("\n| ") + 1 :].partition("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_each_fast_path_has_a_switch_and_a_test() -> None:
    options = {each.name: each.metadata for each in fields(TrainRequest)}
    rows = fast_paths()

    assert len(rows) >= 8
    for path, _, switch, test in rows:
        found = re.fullmatch(r"`--([a-z-]+) ([a-z]+)`", switch)
        assert found, path
        name, value = found[1].replace("-", "_"), found[2]
        assert name in options, path
        choices = options[name]["choices"]
        assert not choices or value in choices, path
        file, _, function = test.strip("`").partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), path


def test_the_document_in_chinese_has_the_same_switches_and_tests() -> None:
    assert [row[2:] for row in fast_paths("speed.zh-CN.md")] == [row[2:] for row in fast_paths()]
