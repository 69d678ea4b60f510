"""Checkpoints of an encrypted run: nothing in the clear, whole or refused, exact to resume."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import secrets
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mst.durable import sha256
from mst.errors import EncryptionError, TrainingError
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training import checkpoint, tensor_files
from mst.training.checkpoint import TrainState, checkpoint_path
from mst.training.loop import run
from mst.training.sealed_directory import MANIFEST, remove, write_sealed
from mst.training.session import Session

if TYPE_CHECKING:
    import torch

Begin = Callable[..., Session]


@pytest.fixture
def keys() -> KeyRing:
    """A run's own key."""
    return KeyRing((secrets.token_bytes(32),))


@pytest.fixture
def saved(begin: Begin, keys: KeyRing) -> Path:
    """Two whole checkpoints of adapters, of steps 2 and 4."""
    session = dataclasses.replace(begin(total_steps=4, save_steps=2), keys=keys)
    run(session, TrainState())
    return session.checkpoints


def tensors_of(path: Path, keys: KeyRing) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, by file and name."""
    ending = tensor_files.file_name(tensor_files.ENDING, keys)
    return {
        f"{each.name.removesuffix('.mst')}: {name}": tensor
        for each in path.glob(f"*{ending}")
        for name, tensor in tensor_files.read(each, keys).items()
    }


def assert_none_in_the_clear(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Look for safetensors' header and for a piece of every tensor in every file."""
    import torch

    pieces = []
    for name, each in tensors.items():
        data = bytes(each.reshape(-1).view(torch.uint8).numpy()[:4096])
        middle = data[len(data) // 2 :][:24]
        if len(set(middle)) > 4:  # rows of zeros are everywhere
            pieces.append((name, middle))
    assert pieces
    for path in (each for each in directory.rglob("*") if each.is_file()):
        found = path.read_bytes()
        assert b'"data_offsets"' not in found, path.name
        for name, piece in pieces:
            assert piece not in found, f"{name} in {path.name}"


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_it_holds_what_a_plain_one_holds_and_nothing_of_it_in_the_clear(
    begin: Begin, keys: KeyRing, tuner: str
) -> None:
    import torch

    plain = begin(tuner=tuner, total_steps=2)
    run(plain, TrainState())
    held = tensors_of(checkpoint_path(plain.checkpoints, 2), NO_KEYS)
    with pytest.raises(AssertionError):
        assert_none_in_the_clear(plain.checkpoints, held)
    shutil.rmtree(plain.checkpoints)
    session = dataclasses.replace(begin(tuner=tuner, total_steps=2), keys=keys)
    run(session, TrainState())
    found = tensors_of(checkpoint_path(session.checkpoints, 2), keys)

    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], held[name]) for name in held)
    assert_none_in_the_clear(session.checkpoints, held)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_going_on_ends_as_without_a_stop(begin: Begin, keys: KeyRing, tuner: str) -> None:
    import torch

    options: dict[str, Any] = {"tuner": tuner, "total_steps": 6, "save_steps": 3}
    options |= {"lora_dropout": 0.1, "save_total_limit": 3}
    whole = dataclasses.replace(begin(**options), keys=keys)
    run(whole, TrainState())
    uninterrupted = tensors_of(checkpoint_path(whole.checkpoints, 6), keys)
    remove(checkpoint_path(whole.checkpoints, 6))
    again = dataclasses.replace(begin(**options), keys=keys)
    newest = checkpoint.newest_whole(again.checkpoints, keys)
    assert newest is not None
    state = checkpoint.restore(
        newest, again.model, again.optimizer, again.names, again.device, keys=keys
    )
    run(again, state)
    found = tensors_of(checkpoint_path(again.checkpoints, 6), keys)

    assert state.step == 3
    assert found.keys() == uninterrupted.keys()
    assert all(torch.equal(found[name], uninterrupted[name]) for name in uninterrupted)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def hash_anew(directory: Path) -> None:
    """Make the manifest say what the files are, as somebody without the key would."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    for name, facts in manifest["files"].items():
        file = directory / name
        facts |= {"sha256": sha256(file), "bytes": file.stat().st_size}
    path.write_text(json.dumps(manifest))


def flipped(newest: Path, older: Path) -> None:
    flip_a_bit(newest / "optimizer.safetensors.mst")


def flipped_and_hashed(newest: Path, older: Path) -> None:
    flip_a_bit(newest / "optimizer.safetensors.mst")
    hash_anew(newest)


def other_step_edited_in(newest: Path, older: Path) -> None:
    text = (newest / checkpoint.STATE).read_text()
    (newest / checkpoint.STATE).write_text(text.replace('"step": 4', '"step": 3'))
    hash_anew(newest)


def one_file_of_the_older(newest: Path, older: Path) -> None:
    shutil.copy(older / "optimizer.safetensors.mst", newest)
    hash_anew(newest)


def all_of_the_older(newest: Path, older: Path) -> None:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)


@pytest.mark.parametrize(
    "change",
    [flipped, flipped_and_hashed, other_step_edited_in, one_file_of_the_older, all_of_the_older],
)
def test_a_changed_one_is_passed_over_for_the_earlier_one(
    saved: Path, keys: KeyRing, change: Callable[[Path, Path], None]
) -> None:
    newest, older = checkpoint_path(saved, 4), checkpoint_path(saved, 2)
    assert checkpoint.newest_whole(saved, keys) == newest
    before = {each.name: sha256(each) for each in older.iterdir()}
    change(newest, older)

    assert checkpoint.newest_whole(saved, keys) == older
    assert {each.name: sha256(each) for each in older.iterdir()} == before


def test_a_flipped_bit_is_found_by_the_file_itself_too(saved: Path, keys: KeyRing) -> None:
    path = checkpoint_path(saved, 4) / "adapter_model.safetensors.mst"
    flip_a_bit(path)

    with pytest.raises(EncryptionError, match="is not what was encrypted"):
        tensor_files.read(path, keys)


def test_another_key_opens_nothing_and_plain_tensors_are_not_taken(
    saved: Path, keys: KeyRing, tmp_path: Path
) -> None:
    newest, other = checkpoint_path(saved, 4), KeyRing((secrets.token_bytes(32),))

    assert not checkpoint.is_whole(newest, other)
    with pytest.raises(EncryptionError, match="does not open with key-file"):
        tensor_files.read(newest / "optimizer.safetensors.mst", other)
    plain = tmp_path / "plain.safetensors.mst"
    tensor_files.write(tensors_of(newest, keys), plain, NO_KEYS)
    with pytest.raises(EncryptionError, match="begins with other bytes"):
        tensor_files.read(plain, keys)


def test_tensors_that_a_library_wrote_by_itself_are_not_kept(keys: KeyRing, tmp_path: Path) -> None:
    import torch

    def fill(part: Path) -> None:
        tensor_files.write({"a": torch.ones(3)}, part / "model.safetensors", NO_KEYS)

    with pytest.raises(TrainingError, match="was written unencrypted"):
        write_sealed(tmp_path / "model", fill, keys)

    assert not list(tmp_path.iterdir())


def test_a_save_that_is_killed_half_way_leaves_ciphertext_alone(
    begin: Begin, keys: KeyRing, tmp_path: Path
) -> None:
    session = dataclasses.replace(begin(tuner="full", total_steps=2), keys=keys)
    run(session, TrainState())
    held = tensors_of(checkpoint_path(session.checkpoints, 2), keys)
    child = os.fork()
    if child == 0:
        # The kernel ends the process in the middle of a write, as soon as a file passes 256 KiB.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        random = checkpoint.random_states(session.device)
        checkpoint.save(
            session.checkpoints, TrainState(step=9), session.model, session.optimizer,
            session.names, random, keys=keys,
        )  # fmt: skip
        os._exit(0)
    _, status = os.waitpid(child, 0)
    part = session.checkpoints / ".step-00000009.part"

    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert (part / "model.safetensors.mst").stat().st_size == 1 << 18
    assert_none_in_the_clear(session.checkpoints, held)
    assert checkpoint.newest_whole(session.checkpoints, keys) == checkpoint_path(
        session.checkpoints, 2
    )
