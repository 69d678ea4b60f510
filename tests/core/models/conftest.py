"""A hub that has the tiny model, and places for models that are the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.stand_in_hub import StandIn, serving


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the place for models; no other place of this machine is looked at."""
    for name in ("MST_MODELS", "MODELSCOPE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
                 "TRANSFORMERS_OFFLINE", "MST_SEAL"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "data" / "mst" / "models"


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[StandIn]:
    """Serve the tiny model as org/tiny, with pickled weights and code beside it."""
    files = {each.name: each.read_bytes() for each in tiny_model.iterdir()}
    files |= {
        "pytorch_model.bin": b"\x80\x02pickle", "modeling_tiny.py": b"raise SystemExit",
        "README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\n", ".gitattributes": b"*",
    }  # fmt: skip
    with serving(StandIn("org/tiny", files, large=("model.safetensors",))) as found:
        yield found
