"""Other trainers as rows of the matrix: which there are, where they live, and what they can do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mst.bench.matrix import Matrix
from mst.errors import MstError, UsageError
from mst.launch import offline_environment
from mst.plan import Plan
from mst.request import TrainRequest

DRIVER = Path(__file__).with_name("peer_driver.py")
# What each is called among Python's packages.
PEERS = ("trl", "llamafactory", "ms-swift", "unsloth")
# Whose devices they train on by themselves.
BACKENDS = ("cpu", "cuda")
_ANSWER_SECONDS = 60.0
_VISIBLE = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES")


class PeerAbsent(MstError):
    """A peer is not in the environment that was named for it."""


class PeerRefused(MstError):
    """A peer can't do what mst does in a cell, so the two could not be compared."""


def peers_of(names: Iterable[str], pythons: Iterable[str], own: str) -> dict[str, str]:
    """Return the interpreter of each peer.

    Args:
        names: as `--peer` gives them.
        pythons: NAME=PYTHON, as `--peer-python` gives them.
        own: the interpreter of this environment, which is a peer's where none is named.

    Raises:
        UsageError: a peer is not known, or an interpreter is nobody's.
    """
    found = dict.fromkeys(names, own)
    for name in found:
        if name not in PEERS:
            raise UsageError(f"--peer {name}: no such peer. There are {', '.join(PEERS)}.")
    for each in pythons:
        name, equals, python = each.partition("=")
        if not equals or not name or not python:
            raise UsageError(
                f"--peer-python takes NAME=PYTHON, such as trl=/opt/trl/bin/python; found {each!r}."
            )
        if name not in found:
            raise UsageError(f"--peer-python {each}: {name} is not asked for. Add --peer {name}.")
        # Not resolved: an environment's python is a link, and is known by where the link lies.
        found[name] = os.path.abspath(os.path.expanduser(python))
    return found


def check_matrix(matrix: Matrix, peers: Mapping[str, str]) -> None:
    """Make sure that peers can see the same rows in each step.

    Raises:
        UsageError: rows are packed, which each does in its own way.
    """
    if peers and matrix.procedure.packing:
        raise UsageError(
            f"--peer {' '.join(peers)}: with packing each tool fills its blocks with other rows, so"
            " steps could not be compared. Write packing: false in the matrix."
        )


def installed(name: str, python: str) -> Mapping[str, str]:
    """Return the versions of a peer and its libraries, as its own environment names them.

    Raises:
        PeerAbsent: the interpreter can't be started, or it has no such peer.
    """
    command = [python, "-I", str(DRIVER), name, "version"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=_ANSWER_SECONDS, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
    except OSError as error:
        raise PeerAbsent(
            f"--peer-python {name}={python} can't be started: {error.strerror}."
        ) from None
    except (subprocess.SubprocessError, ValueError):
        raise PeerAbsent(
            f"--peer-python {name}={python} does not answer as a Python of 3.10 or later does."
        ) from None
    if not found:
        raise PeerAbsent(
            f"{name} is not installed in the environment of {python}. Install it there, or name"
            f" another with --peer-python {name}=PYTHON."
        )
    return {str(key): str(value) for key, value in found.items()}


def check_plan(name: str, plan: Plan, request: TrainRequest) -> None:
    """Make sure that a peer can do what mst plans.

    Raises:
        PeerRefused: says what it can't.
    """
    fine = request.task == "sft" and plan.tuner == "lora" and plan.quantization == "none"
    reasons = {
        "peers are measured with LoRA on plain weights, in supervised fine-tuning": not fine,
        f"peers are measured on {' and '.join(BACKENDS)}": plan.backend not in BACKENDS,
        "peers are measured on one device": plan.world_size > 1,
        "products and weights must have one dtype": plan.weights_dtype != plan.compute_dtype,
        "the optimizer must be adamw_torch": plan.optim != "adamw_torch",
        "of gradient checkpointing peers know all layers or none":
            plan.gradient_checkpointing and plan.checkpointed_layers is not None,
        "rows must not be streamed": request.streaming,
        "there must be no privacy budget": plan.privacy is not None,
    }  # fmt: skip
    why = next((reason for reason, there in reasons.items() if there), "")
    if why:
        raise PeerRefused(f"{name} does not do this cell as mst does: {why}.")


def check_model(name: str, model: Path) -> None:
    """Make sure that a peer runs no code that lies beside a model's weights, which mst never does.

    Raises:
        PeerRefused: there is some, and the peer has no option to leave it alone.

    Source: ms-swift 4.6, swift/model/model_meta.py, `_get_model_info`.
    """
    if name != "ms-swift":
        return
    for file in (model / each for each in ("config.json", "tokenizer_config.json")):
        if file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
            raise PeerRefused(
                f"ms-swift runs the code that {file} names (auto_map), and mst never does. Take"
                " that key out of a copy of the model, or measure another peer."
            )


def visible(plan: Plan) -> dict[str, str]:
    """Return the variables that say which cards a peer may see; it takes whatever it sees.

    What else a plan sets, such as an allocator's ways, is mst's own.
    """
    if plan.backend == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {name: plan.environment[name] for name in _VISIBLE if name in plan.environment}


def peer_environment(environ: Mapping[str, str], place: Path, threads: int) -> dict[str, str]:
    """Return a peer's environment: offline, and with a home of its own for what libraries keep."""
    home = str(place)
    return {
        **environ, **offline_environment(),
        "HF_DATASETS_OFFLINE": "1", "WANDB_DISABLED": "true", "DISABLE_VERSION_CHECK": "1",
        "HOME": home, "TMPDIR": home, "HF_HOME": home, "XDG_CACHE_HOME": home,
        "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip


def handed_over(job: Mapping[str, object]) -> int:
    """Return a descriptor of anonymous memory that holds a job: rows lie in no file.

    It is inherited by what is started with it.

    Source: memfd_create(2).
    """
    handle = os.memfd_create("mst-peer", 0)
    text = memoryview(json.dumps(job).encode())
    while text:
        text = text[os.write(handle, text) :]
    return handle


def driver_command(name: str, python: str, handle: int) -> list[str]:
    """Return the command line that trains with a peer; `-I` keeps our folder off its path."""
    return [python, "-I", str(DRIVER), name, str(handle)]


def job_of(
    plan: Plan, request: TrainRequest, warmup_steps: int, rows: Sequence[object]
) -> dict[str, object]:
    """Return what a driver is told of a plan, without its places."""
    return {
        "dtype": plan.compute_dtype, "attention": plan.attention, "threads": plan.threads,
        "device": "cpu" if plan.backend == "cpu" else plan.torch_devices[0],
        "batch": plan.per_device_train_batch_size, "max_length": plan.max_length,
        "accumulation": plan.gradient_accumulation_steps, "steps": plan.total_steps,
        "checkpointing": plan.gradient_checkpointing, "rate": plan.learning_rate,
        "schedule": request.lr_scheduler_type, "warmup_steps": warmup_steps,
        "weight_decay": request.weight_decay, "epsilon": request.adam_epsilon,
        "betas": [request.adam_beta1, request.adam_beta2],
        "max_grad_norm": request.max_grad_norm, "seed": request.seed, "rows": rows,
    }  # fmt: skip
