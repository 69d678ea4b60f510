"""Checkpoints: whole or absent, proved by hashes, without pickle, and enough to go on exactly."""

from __future__ import annotations

import hmac
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst import serial
from mst.durable import sha256
from mst.errors import RunError
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training import tensor_files
from mst.training import zero as sharded
from mst.training.optimizers import optimizer_tensors, restore_optimizer
from mst.training.parallel import ALONE, Group, rank_name, share_text, shared_tensors
from mst.training.sealed_directory import (
    MANIFEST,
    empty,
    manifest_mac,
    remove,
    seal,
    whole_or_absent,
)
from mst.training.tensor_files import ADAPTER_WEIGHTS, Write, file_name

if TYPE_CHECKING:
    import torch

OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimizer steps.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on, padding not counted.
        best_step: step of the best held-out loss so far; None before the first evaluation.
        best_loss: that loss; of an objective with a goal, the highest metric's negative.
        worse_evaluations: evaluations since then.
        train_seconds: wall time spent in steps.
        micro_batch: rows a micro-batch, once memory has forced fewer than planned; else None.
        loss_scale: of float16; None before the first step, and 1 in other dtypes.
        good_steps: steps in a row since it last changed.
    """

    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    worse_evaluations: int = 0
    train_seconds: float = 0.0
    micro_batch: int | None = None
    loss_scale: float | None = None
    good_steps: int = 0


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps lies."""
    return directory / f"step-{step:08d}"


def write_weights(
    model: torch.nn.Module,
    target: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    keys: KeyRing = NO_KEYS,
    write: Write | None = None,
) -> None:
    """Write the trained weights in the layout of PEFT (adapters) or transformers (whole models).

    Args:
        model: ready to be trained.
        target: a directory.
        weights: the trained weights by name, where the model's own are only a share.
        keys: of an encrypted run.
        write: takes the tensors of a file, in place of the library's function and of `keys`'.
    """
    whole: Any = model
    # safetensors only: no pickle can hide in a checkpoint.
    arguments: dict[str, Any] = {"safe_serialization": True}
    if weights is not None:
        arguments["state_dict"] = {**_persistent_buffers(model), **weights}
    if weights is not None and hasattr(model, "peft_config"):
        # Left to itself, PEFT looks for changes in embeddings that this rank has no copy of.
        arguments |= {"state_dict": dict(weights), "save_embedding_layers": False}
    with tensor_files.saving(keys, write):
        whole.save_pretrained(target, **arguments)


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer.cpu() for name, buffer in model.named_buffers() if name in kept}


def trained_names(model: torch.nn.Module) -> dict[str, str]:
    """Return the name of each weight in a checkpoint's file, to its name in the model."""
    import torch

    names = [name for name, each in model.named_parameters() if each.requires_grad]
    if not hasattr(model, "peft_config"):
        return {name: name for name in names}
    from peft import get_peft_model_state_dict

    untyped: Any = get_peft_model_state_dict
    places = {name: torch.tensor(place) for place, name in enumerate(names)}
    renamed = untyped(model, state_dict=places, save_embedding_layers=False)
    return {key: names[int(place)] for key, place in renamed.items()}


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the host's and the device's random generators, on the host."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device).cpu()
    return states


def _restore_random(device: torch.device, states: dict[str, torch.Tensor], rank: int) -> None:
    import torch

    # A run that goes on on another kind of device, or on more of them, begins their states anew.
    if rank_name("cpu", rank) in states:
        torch.set_rng_state(states[rank_name("cpu", rank)])
    if device.type != "cpu" and rank_name(device.type, rank) in states:
        state = states[rank_name(device.type, rank)]
        torch.get_device_module(device).set_rng_state(state, device)


def save(
    directory: Path,
    state: TrainState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    random: dict[str, torch.Tensor],
    gathered: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None,
    keys: KeyRing = NO_KEYS,
) -> Path:
    """Write a checkpoint and return its path; it appears under its name only when it is whole.

    Args:
        directory: of the run's checkpoints.
        state: where the run stands.
        model: its trained weights are written.
        optimizer: its state is written.
        names: `id` of each trained weight to its name.
        random: `random_states`, of every rank.
        gathered: the trained weights and the optimizer's tensors, where DeepSpeed has shared them
            out.
        keys: of an encrypted run.

    Raises:
        TrainingError: it can't be written (a full disk, say); nothing half-written is left.
    """
    import torch

    target = checkpoint_path(directory, state.step)
    with torch.no_grad(), whole_or_absent(target) as part:
        empty(part)
        fill(part, state, model, optimizer, names, random, gathered, keys)
        seal(part, target, keys)
    return target


def fill(
    part: Path,
    state: TrainState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    random: dict[str, torch.Tensor],
    gathered: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None,
    keys: KeyRing,
    write: Write | None = None,
) -> None:
    """Write a checkpoint's files into a directory; arguments are those of `save`.

    Args:
        part: the directory.
        write: takes the tensors of each file; None to write them here.
    """
    weights, tensors = gathered or (None, optimizer_tensors(optimizer, names))
    write_weights(model, part, weights, keys, write)
    if write is None:
        write = tensor_files.write
        tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    write(tensors, part / file_name(OPTIMIZER, keys), keys, None)
    write(random, part / file_name(RANDOM, keys), keys, None)
    (part / STATE).write_text(serial.dumps(state), encoding="utf-8")


def set_aside(target: Path, directory: Path) -> None:
    """Move a checkpoint that the run will write again out of the way, without losing it."""
    directory.mkdir(exist_ok=True)
    place = directory / target.name
    shutil.rmtree(place, ignore_errors=True)
    target.rename(place)


def is_whole(checkpoint: Path, keys: KeyRing = NO_KEYS) -> bool:
    """Return whether every file that the manifest names is there with its hash.

    With the keys of an encrypted run the manifest itself has to be what the run wrote.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files: dict[str, Any] = manifest["files"]
        mac = manifest_mac(checkpoint.name, files, keys)
        return all(hmac.compare_digest(manifest[name], mac[name]) for name in mac) and all(
            (checkpoint / name).stat().st_size == facts["bytes"]
            and sha256(checkpoint / name) == facts["sha256"]
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def listed(directory: Path) -> tuple[Path, ...]:
    """Return the checkpoints in a directory, oldest first, whole or not."""
    return tuple(sorted(directory.glob("step-*")))


def newest_whole(directory: Path, keys: KeyRing = NO_KEYS) -> Path | None:
    """Return the newest checkpoint that is whole, as `is_whole` says, or None."""
    return next((each for each in reversed(listed(directory)) if is_whole(each, keys)), None)


def discard_parts(directory: Path) -> None:
    """Remove what a killed save or delete left behind."""
    for part in directory.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def read_state(checkpoint: Path) -> TrainState:
    """Return the state in a checkpoint."""
    return serial.load(TrainState, checkpoint / STATE)


def restore(
    checkpoint: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    device: torch.device,
    group: Group = ALONE,
    zero: sharded.Zero | None = None,
    keys: KeyRing = NO_KEYS,
) -> TrainState:
    """Load weights, optimizer, random states and position from a whole checkpoint, on every rank.

    Rank 0 reads and the others are told: they may be on machines that don't have the file. How
    many ranks wrote it, and with which strategy, makes no difference.

    Args:
        checkpoint: a directory; looked into by rank 0 only.
        model: prepared as it was when the checkpoint was written.
        optimizer: over its trained weights.
        names: `id` of each trained weight to its name.
        device: of this rank.
        group: this rank's place.
        zero: what DeepSpeed holds, if it does.
        keys: of an encrypted run; rank 0 alone needs them.
    """

    def read(name: str) -> dict[str, torch.Tensor]:
        return tensor_files.read(checkpoint / file_name(name, keys), keys) if group.first else {}

    if zero is not None:
        restore_weights(checkpoint, model, group, zero, keys)
        sharded.set_optimizer(zero, shared_tensors(group, read(OPTIMIZER)))
    else:
        if group.first:
            load_weights(checkpoint, model, keys)
        restore_optimizer(optimizer, names, dict(shared_tensors(group, read(OPTIMIZER))))
    _restore_random(device, dict(shared_tensors(group, read(RANDOM))), group.rank)
    text = share_text(group, (checkpoint / STATE).read_text("utf-8") if group.first else "")
    state = serial.from_json(TrainState, json.loads(text))
    if zero is not None and state.loss_scale not in (None, 1.0):
        sharded.set_loss_scale(zero, float(state.loss_scale or 1.0))
    return state


def restore_weights(
    checkpoint: Path,
    model: torch.nn.Module,
    group: Group,
    zero: sharded.Zero,
    keys: KeyRing = NO_KEYS,
) -> None:
    """Put a checkpoint's trained weights into a model that DeepSpeed has shared out.

    Raises:
        RunError: the checkpoint's weights don't fit the model.
    """
    tensors: dict[str, torch.Tensor] = {}
    if group.first:
        names = trained_names(model)
        # A buffer has no share.
        buffers = _persistent_buffers(model)
        tensors = {
            names.get(key, key): value
            for key, value in tensor_files.read_weights(checkpoint, keys).items()
            if key not in buffers
        }
    sharded.set_weights(zero, shared_tensors(group, tensors))


def load_weights(checkpoint: Path, model: torch.nn.Module, keys: KeyRing = NO_KEYS) -> None:
    """Put a checkpoint's trained weights into a model that was prepared in the same way.

    Raises:
        RunError: the checkpoint's weights don't fit the model.
    """
    tensors = tensor_files.read_weights(checkpoint, keys)
    if (checkpoint / file_name(ADAPTER_WEIGHTS, keys)).is_file():
        from peft import set_peft_model_state_dict

        outcome: Any = set_peft_model_state_dict(model, tensors)
        unexpected = list(outcome.unexpected_keys)
    else:
        # Tied weights are stored once, so some keys are missing by design.
        found: Any = model.load_state_dict(tensors, strict=False)
        unexpected = list(found.unexpected_keys)
    if unexpected:
        raise RunError(
            f"{checkpoint} holds weights that this model lacks ({unexpected[0]} …)."
            " Resume with the options that the run was started with."
        )


def prune(directory: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and the best one."""
    protected = {checkpoint_path(directory, best_step)} if best_step is not None else set()
    for each in listed(directory)[:-keep]:
        if each not in protected:
            remove(each)
