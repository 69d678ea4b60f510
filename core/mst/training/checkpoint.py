"""Checkpoints: whole or absent, proved by hashes, without pickle, and enough to go on exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst import serial
from mst.durable import seal_directory, sha256
from mst.errors import RunError, TrainingError
from mst.training.parallel import rank_name

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
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
        best_loss: that loss.
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


def write_weights(model: torch.nn.Module, target: Path) -> None:
    """Write the trained weights in the layout of PEFT (adapters) or transformers (whole models)."""
    # safetensors only: no pickle can hide in a checkpoint.
    model.save_pretrained(target, safe_serialization=True)  # type: ignore[operator]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[int, str]
) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as named tensors: "exp_avg/<parameter>" and so on.

    Args:
        optimizer: AdamW.
        names: `id` of each parameter to its name.
    """
    return {
        f"{key}/{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises:
        RunError: the tensors belong to other parameters.
    """
    by_name = {
        names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]
    }
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in by_name:
            raise RunError(
                f"the checkpoint's optimizer holds {name!r}, which this run does not train."
                " Resume with the options that the run was started with."
            )
        parameter, group = by_name[name]
        # AdamW keeps its step counter on the host unless it is fused or capturable.
        on_host = kind == "step" and not (group.get("fused") or group.get("capturable"))
        optimizer.state[parameter][kind] = value if on_host else value.to(parameter.device)


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
) -> Path:
    """Write a checkpoint and return its path; it appears under its name only when it is whole.

    Args:
        directory: of the run's checkpoints.
        state: where the run stands.
        model: its trained weights are written.
        optimizer: its state is written.
        names: `id` of each trained weight to its name.
        random: `random_states`, of every rank.

    Raises:
        TrainingError: it can't be written (a full disk, say); nothing half-written is left.
    """
    import torch
    from safetensors.torch import save_file

    def fill(part: Path) -> None:
        write_weights(model, part)
        tensors = optimizer_tensors(optimizer, names)
        host = {key: value.cpu().contiguous() for key, value in tensors.items()}
        save_file(host, part / OPTIMIZER)
        save_file(random, part / RANDOM)
        (part / STATE).write_text(serial.dumps(state), encoding="utf-8")

    target = checkpoint_path(directory, state.step)
    with torch.no_grad():
        write_sealed(target, fill)
    return target


def write_sealed(target: Path, fill: Callable[[Path], None]) -> None:
    """Make directory `target` with what `fill` writes and a manifest of hashes, or not at all.

    Raises:
        TrainingError: it can't be written; the partial copy is removed.
    """
    from safetensors import SafetensorError

    part = target.with_name(f".{target.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        fill(part)
        files = sorted(each for each in part.rglob("*") if each.is_file())
        listing = {
            str(each.relative_to(part)): {"sha256": sha256(each), "bytes": each.stat().st_size}
            for each in files
        }
        (part / MANIFEST).write_text(json.dumps({"files": listing}, indent=2), encoding="utf-8")
        if target.exists():
            remove(target)
        seal_directory(part, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise TrainingError(
            f"cannot write {target}: {reason}. Earlier checkpoints are untouched."
            " Free some space (or fix the directory's permissions), then run the same command"
            " with --resume."
        ) from None


def remove(target: Path) -> None:
    """Delete a checkpoint so that a crash on the way can't leave a part of it under its name."""
    trash = target.with_name(f".{target.name}.trash.part")
    shutil.rmtree(trash, ignore_errors=True)
    target.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def set_aside(target: Path, directory: Path) -> None:
    """Move a checkpoint that the run will write again out of the way, without losing it."""
    directory.mkdir(exist_ok=True)
    place = directory / target.name
    shutil.rmtree(place, ignore_errors=True)
    target.rename(place)


def is_whole(checkpoint: Path) -> bool:
    """Return whether every file that the manifest names is there with its hash."""
    try:
        files: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return all(
            (checkpoint / name).stat().st_size == facts["bytes"]
            and sha256(checkpoint / name) == facts["sha256"]
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def listed(directory: Path) -> tuple[Path, ...]:
    """Return the checkpoints in a directory, oldest first, whole or not."""
    return tuple(sorted(directory.glob("step-*")))


def newest_whole(directory: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None."""
    return next((each for each in reversed(listed(directory)) if is_whole(each)), None)


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
    rank: int = 0,
) -> TrainState:
    """Load weights, optimizer, this rank's random state and position from a whole checkpoint."""
    from safetensors.torch import load_file

    load_weights(checkpoint, model)
    restore_optimizer(optimizer, names, load_file(checkpoint / OPTIMIZER))
    _restore_random(device, load_file(checkpoint / RANDOM), rank)
    return read_state(checkpoint)


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Put a checkpoint's trained weights into a model that was prepared in the same way.

    Raises:
        RunError: the checkpoint's weights don't fit the model.
    """
    from safetensors.torch import load_file

    if (checkpoint / "adapter_model.safetensors").is_file():
        from peft import set_peft_model_state_dict

        tensors = load_file(checkpoint / "adapter_model.safetensors")
        outcome: Any = set_peft_model_state_dict(model, tensors)
        unexpected = list(outcome.unexpected_keys)
    else:
        tensors = {}
        for shard in sorted(checkpoint.glob("model*.safetensors")):
            tensors |= load_file(shard)
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
