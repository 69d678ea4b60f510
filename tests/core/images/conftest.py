"""Tiny image-text models, and rows with squares of one colour."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.images.tiny_models import FAMILIES

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "white": (240, 240, 240),
}
SIZES = ((56, 56), (90, 40), (40, 120), (28, 28))


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a tiny model of a family; made once."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("vision-models") / family
            FAMILIES[family](path)
            made[family] = path
        return made[family]

    return find


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-eight rows, each with a square of one of four colours and its name."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("squares")
    rows = []
    for number in range(48):
        name = list(COLOURS)[number % 4]
        size = SIZES[number // 4 % 4]
        Image.new("RGB", size, COLOURS[name]).save(directory / f"{number}.png")
        rows.append(asked("<image>what colour?", name) | {"images": [f"{number}.png"]})
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(question: Any, answer: str) -> dict[str, Any]:
    """Return a row with one question and its answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}
