"""What a bug report holds: versions, devices, the doctor's checks, the shape of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mst import rundir
from mst.bug_report.blank import (
    blanked,
    field_names,
    named_nothing,
    names_here,
    without_names,
    words_of_options,
)
from mst.facts import MachineFacts

# Of variables the names alone: they steer libraries, and their values may be a person's.
_VARIABLES = (
    "MST_", "HF_", "TRANSFORMERS_", "CUDA_", "ASCEND_", "NCCL_", "HCCL_", "OMP_", "MKL_", "PYTORCH",
    "TORCH", "XDG_", "MODELSCOPE_", "LD_", "PYTHON",
)  # fmt: skip
_FIGURES = frozenset(
    {
        "accuracy_before_restricted", "accuracy_after_restricted", "accuracy_before_free",
        "accuracy_after_free", "accuracy_baseline", "accuracy_rows", "best_eval_loss",
        "best_eval_reward", "steps", "tokens", "peak_bytes", "seconds", "tokens_per_second",
        "eval_loss", "train_loss", "loss",
    }
)  # fmt: skip
_README = """\
What `mst bug-report` wrote. Every text that could name a person, a place or a row is taken out:
of runs only numbers and words of the program are kept; of messages, paths, addresses and names of
the machine and its user are replaced. Look through the files before you send them.
"""


def contents(environ: Mapping[str, str], run: Path | None) -> dict[str, bytes]:
    """Return the files of a bug report, by name.

    Args:
        environ: the process's environment; of its variables the names alone are kept.
        run: the directory of a run; None for a report without one.
    """
    from mst.cli.doctor import all_checks
    from mst.probe import machine_facts
    from mst.registry import load

    names = names_here(environ)
    registry = load()
    found: dict[str, Any] = {
        "versions.json": _versions(names),
        "devices.json": machine(machine_facts(registry), names),
        "plugins.json": _scrubbed([asdict(each) for each in registry.records], names),
        "doctor.json": _scrubbed([asdict(each) for each in all_checks(environ)], names),
        "variables.json": sorted(name for name in environ if name.startswith(_VARIABLES)),
    }
    if run is not None:
        found |= run_documents(run, names)
    files = {"README.txt": _README.encode()}
    for name, value in found.items():
        files[name] = json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _versions(names: tuple[str, ...]) -> dict[str, Any]:
    """Return the versions of all parts; a version may look like an address, and is kept."""
    from mst.versions import versions

    plain = asdict(versions())
    plain["platform"] = named_nothing(plain["platform"], names)  # of a kernel that somebody built
    plain["plugins"] = {
        named_nothing(name, names): named_nothing(of, names)
        for name, of in plain["plugins"].items()
    }
    return plain


def machine(facts: MachineFacts, names: tuple[str, ...]) -> Any:
    """Return what backends report of a machine, without what names one device of all."""
    plain = asdict(facts)
    for report in plain["backends"]:
        for device in report["probe"]["devices"]:
            del device["uuid"]  # no other device in the world has it
    return _scrubbed(plain, names)


def _scrubbed(value: Any, names: tuple[str, ...]) -> Any:
    """Return a document with every text as `without_names` leaves it."""
    if isinstance(value, str):
        return without_names(value, names)
    if isinstance(value, Mapping):
        return {key: _scrubbed(each, names) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(each, names) for each in value]
    return value


def run_documents(run: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return a run's documents with their numbers, and the names of its files.

    A document that can't be read says so.
    """
    from mst.plan import Plan
    from mst.request import TrainRequest
    from mst.rundir import RunManifest

    keys = field_names(Plan, TrainRequest, RunManifest, MachineFacts) | _FIGURES
    keys |= {"python", "torch", "transformers", "peft", "safetensors", "tokenizers"}
    words = words_of_options()
    found: dict[str, Any] = {}
    for name in (rundir.MANIFEST, rundir.PLAN, rundir.REQUEST):
        try:
            plain = json.loads((run / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found[f"run/{name}"] = {"unreadable": type(error).__name__}
        else:
            found[f"run/{name}"] = blanked(plain, keys, words)
    with suppress(OSError, ValueError):
        from mst import serial

        facts = serial.load(MachineFacts, run / rundir.FACTS)
        found[f"run/{rundir.FACTS}"] = machine(facts, names)
    return found
