"""Checkpoints that are written beside the steps: the same bytes, whole or absent, and no later."""

from __future__ import annotations

import os
import resource
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mst.errors import OutOfMemory, TrainingError
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training import checkpoint, tensor_files
from mst.training.background_save import Writer, begin_save
from mst.training.checkpoint import TrainState, checkpoint_path
from mst.training.loop import run
from mst.training.session import Session

Begin = Callable[..., Session]


def files(directory: Path) -> dict[str, bytes]:
    """Return all files below a directory."""
    return {
        str(each.relative_to(directory)): each.read_bytes()
        for each in sorted(directory.rglob("*"))
        if each.is_file()
    }


def began(session: Session, directory: Path, step: int, keys: KeyRing = NO_KEYS) -> Any:
    return begin_save(
        directory, TrainState(step=step), session.model, session.optimizer, session.names,
        checkpoint.random_states(session.device), keys,
    )  # fmt: skip


def saved(session: Session, directory: Path, step: int) -> Path:
    return checkpoint.save(
        directory, TrainState(step=step), session.model, session.optimizer, session.names,
        checkpoint.random_states(session.device),
    )  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"tuner": "full"}, {"task": "rm", "packing": False}], ids=str)
def test_its_files_are_those_of_a_save_that_is_waited_for(
    begin: Begin, tmp_path: Path, how: dict[str, Any]
) -> None:
    session = begin(total_steps=2, **how)
    if "task" not in how:
        run(session, TrainState())
    waited = files(saved(session, tmp_path / "waited", 7))
    write = began(session, tmp_path / "beside", 7)
    # The steps go on.
    for each in session.model.parameters():
        each.data.add_(1.0)
    for state in session.optimizer.state.values():
        for value in state.values():
            value.zero_()
    write()

    assert files(checkpoint_path(tmp_path / "beside", 7)) == waited
    assert len(waited) >= 5


def test_a_run_leaves_the_same_checkpoints_with_and_without(begin: Begin, tmp_path: Path) -> None:
    found = []
    for beside in (False, True):
        session = begin(total_steps=8, save_steps=2, async_save=beside)
        run(session, TrainState())
        # train_seconds are the clock's.
        kept = files(session.checkpoints)
        found.append({name: kept[name] for name in kept if "state.json" not in name})
        assert checkpoint.newest_whole(session.checkpoints) is not None
        session.checkpoints.rename(tmp_path / f"checkpoints-{beside}")
    for each in found:
        for name in [name for name in each if "manifest.json" in name]:
            del each[name]  # it has the hash of state.json

    assert found[0] == found[1]
    assert {name.partition("/")[0] for name in found[0]} == {"step-00000006", "step-00000008"}
    assert session.reporter.saves == [2, 4, 6, 8] * 2  # type: ignore[attr-defined]


def test_what_is_written_piece_by_piece_is_what_safetensors_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(7).to(torch.bfloat16), "é/1": torch.arange(9),
        "byte": torch.arange(11, dtype=torch.uint8), "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5), "half": torch.randn(2, 2).half(), "c": torch.randn(1),
        "small": torch.arange(3, dtype=torch.int8), "yes": torch.tensor([True, False]),
        "double": torch.randn(2).double(), "int": torch.arange(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
        "f8a": torch.randn(4).to(torch.float8_e4m3fn), "f8b": torch.randn(4).to(torch.float8_e5m2),
    }  # fmt: skip
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "theirs", metadata)
        tensor_files.write_beside(tensors, tmp_path / "ours", NO_KEYS, metadata)

        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_an_encrypted_one_holds_the_same_and_nothing_in_the_clear(
    begin: Begin, tmp_path: Path
) -> None:
    import torch

    keys = KeyRing((secrets.token_bytes(32),))
    session = begin(total_steps=2)
    run(session, TrainState())
    began(session, tmp_path, 7, keys)()
    path, plain = checkpoint_path(tmp_path, 7), checkpoint_path(session.checkpoints, 2)

    assert checkpoint.is_whole(path, keys)
    assert not list(path.glob("*.safetensors"))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        held = tensor_files.read(plain / name, NO_KEYS)
        found = tensor_files.read(path / f"{name}.mst", keys)
        assert found.keys() == held.keys()
        assert all(torch.equal(found[each], held[each]) for each in held)
        for each in held.values():
            piece = bytes(each.reshape(-1).view(torch.uint8).numpy()[:64])
            assert len(set(piece)) < 5 or piece not in (path / f"{name}.mst").read_bytes()


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file may grow beyond 64 KiB: the write fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("last", [2, 6])
def test_a_failed_one_ends_the_run_with_its_error_and_leaves_nothing(
    begin: Begin, record: Any, small_files_only: None, last: int
) -> None:
    session = begin(tuner="full", total_steps=last, save_steps=2, async_save=True)
    with pytest.raises(TrainingError, match=r"cannot write .*step-00000002.*--resume"):
        run(session, TrainState())

    assert record.saves == []
    assert 2 <= len(record.steps) <= 4
    assert list(session.checkpoints.iterdir()) == []


def test_one_is_on_its_way_at_a_time_and_the_steps_go_on(tmp_path: Path) -> None:
    disk = threading.Event()
    told: list[str] = []

    def write() -> None:
        disk.wait(60)

    with Writer() as writer:
        writer.start(write, lambda: told.append("whole"))
        writer.check()
        assert told == []
        disk.set()
        writer.wait()
        assert told == ["whole"]
        writer.wait()
        assert told == ["whole"]


def failing() -> None:
    raise TrainingError("cannot write step-00000002.")


def ended(write: Callable[[], None], error: BaseException) -> None:
    """Raise an error while something is being written."""
    with Writer() as writer:
        writer.start(write, lambda: None)
        raise error


def test_an_error_keeps_its_kind_and_tells_of_the_failed_save_too() -> None:
    with pytest.raises(OutOfMemory, match=r"memory ran out\. Besides: cannot write step") as found:
        ended(failing, OutOfMemory("memory ran out.", 3, 4, None))

    assert (found.value.step, found.value.micro_batch) == (3, 4)


def test_a_stop_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    slow = tmp_path / "slow"

    def write() -> None:
        time.sleep(0.2)
        slow.touch()

    with pytest.raises(KeyboardInterrupt):
        ended(write, KeyboardInterrupt())

    assert slow.exists()


def test_one_that_is_killed_half_way_leaves_the_former_one(begin: Begin) -> None:
    session = begin(tuner="full", total_steps=2)
    run(session, TrainState())
    former = files(session.checkpoints)
    child = os.fork()
    if child == 0:
        # The kernel ends the process in the middle of a write, as soon as a file passes 256 KiB.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        with Writer() as writer:
            writer.start(began(session, session.checkpoints, 9), lambda: None)
        os._exit(0)
    _, status = os.waitpid(child, 0)

    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert (session.checkpoints / ".step-00000009.part").is_dir()
    assert checkpoint.newest_whole(session.checkpoints) == checkpoint_path(session.checkpoints, 2)
    checkpoint.discard_parts(session.checkpoints)
    assert files(session.checkpoints) == former


def test_training_that_fails_leaves_what_was_on_its_way(begin: Begin, record: Any) -> None:
    session = begin(total_steps=8, save_steps=2, async_save=True)
    for each in session.model.parameters():
        if each.requires_grad:
            broken = each

    class Breaking(type(record)):  # type: ignore[misc]
        def step(self, metrics: Any) -> None:
            super().step(metrics)
            if metrics.step == 3:
                broken.data.fill_(float("nan"))

    session = replace(session, reporter=Breaking())
    with pytest.raises(TrainingError, match="is not finite at step 4"):
        run(session, TrainState())

    assert checkpoint.newest_whole(session.checkpoints) == checkpoint_path(session.checkpoints, 2)
    assert not list(session.checkpoints.glob(".*"))
