"""Checkpoints are whole or absent."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mst.errors import RunError, TrainingError
from mst.training import checkpoint
from mst.training.checkpoint import TrainState
from mst.training.loop import run
from mst.training.sealed_directory import MANIFEST

Begin = Callable[..., Any]


@pytest.fixture
def saved(begin: Begin) -> Path:
    """Two whole checkpoints, of steps 2 and 4."""
    session = begin(total_steps=4, save_steps=2)
    run(session, TrainState())
    directory: Path = session.checkpoints
    return directory


def test_no_pickle_and_every_file_is_in_the_manifest(saved: Path) -> None:
    newest = checkpoint.newest_whole(saved)
    assert newest is not None
    names = {each.name for each in newest.iterdir()}
    listed = json.loads((newest / MANIFEST).read_text())["files"]

    assert names == {*listed, MANIFEST}
    assert {"adapter_model.safetensors", "optimizer.safetensors", "state.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_bit(path / "optimizer.safetensors"),
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"short"),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
    ],
    ids=["bit", "short", "missing", "no manifest", "broken manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(saved: Path, damage: Callable[[Path], object]) -> None:
    newest = checkpoint.checkpoint_path(saved, 4)
    assert checkpoint.newest_whole(saved) == newest
    damage(newest)

    assert checkpoint.newest_whole(saved) == checkpoint.checkpoint_path(saved, 2)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file may grow beyond 64 KiB: the write fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_leaves_nothing_and_keeps_the_earlier_one(
    saved: Path, begin: Begin, small_files_only: None
) -> None:
    session = begin(tuner="full")
    with pytest.raises(TrainingError, match=r"step-00000009.*--resume"):
        checkpoint.save(
            saved, TrainState(step=9), session.model, session.optimizer, session.names,
            checkpoint.random_states(session.device),
        )  # fmt: skip

    assert sorted(each.name for each in saved.iterdir()) == ["step-00000002", "step-00000004"]
    assert checkpoint.newest_whole(saved) == checkpoint.checkpoint_path(saved, 4)


def test_parts_of_a_killed_save_are_discarded(saved: Path) -> None:
    part = saved / ".step-00000006.part"
    shutil.copytree(saved / "step-00000004", part)

    assert checkpoint.newest_whole(saved) == saved / "step-00000004"
    checkpoint.discard_parts(saved)
    assert not part.exists()


def test_a_checkpoint_of_other_options_is_refused(saved: Path, begin: Begin) -> None:
    other = begin(target_modules=("q_proj",))
    newest = checkpoint.newest_whole(saved)
    assert newest is not None
    with pytest.raises(RunError, match="options that the run was started with"):
        checkpoint.restore(newest, other.model, other.optimizer, other.names, other.device)


def test_a_checkpoint_is_replaced_by_a_later_save_of_the_same_step(
    saved: Path, begin: Begin
) -> None:
    session = begin()
    checkpoint.save(
        saved, TrainState(step=4, tokens=77), session.model, session.optimizer, session.names,
        checkpoint.random_states(session.device),
    )  # fmt: skip

    assert checkpoint.is_whole(saved / "step-00000004")
    assert checkpoint.read_state(saved / "step-00000004").tokens == 77
