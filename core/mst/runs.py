"""Runs read back: one summary each, their curves, and how they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mst import rundir
from mst.errors import MstError, RunError
from mst.request import TrainRequest

RUNS = Path("runs")
# Options that say where a run lies or how it was started, not what it does.
_NOT_COMPARED = frozenset({"output_dir", "resume", "models_dir"})

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance; figures that it does not have are None.

    Attributes:
        name: of its directory.
        path: of its directory.
        state: "done", "failed", "interrupted", "running", "killed", "damaged", or "not a run".
        problem: why it failed, or what is wrong with the directory.
        model: as the user named it.
        created: UTC, ISO 8601.
        steps: optimizer steps so far.
        loss: mean training loss of the newest tenth of the steps.
        eval_loss: newest held-out loss.
        accuracy: over the set of answers, after training.
        tokens_per_second: over the whole run.
    """

    name: str
    path: str
    state: str
    problem: str | None = None
    model: str | None = None
    created: str | None = None
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    accuracy: float | None = None
    tokens_per_second: float | None = None


def find_run(text: str, runs: Path = RUNS) -> Path:
    """Return the directory of a run, given as a path or as a name under `runs`.

    Raises:
        RunError: neither is a run.
    """
    for path in (Path(text).expanduser(), runs / text):
        if (path / rundir.MANIFEST).is_file():
            return path
    raise RunError(
        f"{text} is no run: neither {text} nor {runs / text} has a {rundir.MANIFEST}."
        " `mst runs list DIR` shows the runs in a directory."
    )


def newest_done(runs: Path = RUNS) -> Path | None:
    """Return the newest finished run under `runs`, or None."""
    done = [each for each in list_runs(runs) if each.state == "done"] if runs.is_dir() else []
    return Path(done[-1].path) if done else None


def list_runs(directory: Path) -> tuple[RunSummary, ...]:
    """Return the runs in a directory, oldest first; before them what is there and is no run.

    Raises:
        RunError: there is no such directory.
    """
    if not directory.is_dir():
        raise RunError(
            f"{directory} is no directory, so it holds no runs. Pass the directory in which"
            " the runs lie (mst runs list DIR), or start one: mst train"
        )
    found = (each for each in directory.iterdir() if each.is_dir() and each.name[0] != ".")
    return tuple(sorted(map(summary, found), key=lambda each: (each.created or "", each.name)))


def summary(path: Path) -> RunSummary:
    """Return one directory's summary; never raises for what lies in it."""
    if not (path / rundir.MANIFEST).is_file():
        return RunSummary(path.name, str(path), "not a run", f"it has no {rundir.MANIFEST}")
    try:
        manifest = rundir.read_manifest(path)
        state = rundir.state_of(path)
    except (MstError, OSError) as error:
        return RunSummary(path.name, str(path), "damaged", str(error))
    losses, evaluations = curves(path)
    tail = losses[-max(1, len(losses) // 10) :]
    results = manifest.results
    steps = results.get("steps", losses[-1][0] if losses else 0)
    return RunSummary(
        name=path.name,
        path=str(path),
        state=state,
        problem=manifest.error,
        model=manifest.model,
        created=manifest.created,
        steps=int(steps),
        loss=sum(loss for _, loss in tail) / len(tail) if tail else None,
        eval_loss=evaluations[-1][1] if evaluations else None,
        accuracy=results.get("accuracy_after_restricted"),
        tokens_per_second=results.get("tokens_per_second"),
    )


def curves(path: Path) -> tuple[Curve, Curve]:
    """Return the training loss and the held-out loss over the steps, as far as they are whole."""
    try:
        lines = rundir.read_metrics(path)
    except (OSError, UnicodeDecodeError):
        return (), ()
    found: dict[str, list[tuple[int, float]]] = {"loss": [], "eval_loss": []}
    for line in lines:
        for name, points in found.items():
            # A damaged file may hold any JSON.
            if (
                isinstance(line, dict)
                and _is_number(line.get(name))
                and _is_number(line.get("step"))
            ):
                points.append((int(line["step"]), float(line[name])))
    return tuple(found["loss"]), tuple(found["eval_loss"])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def differing_options(runs: Sequence[Path]) -> dict[str, tuple[Any, ...]]:
    """Return the options in which the runs differ: name to one value a run.

    Raises:
        RunError: a run's request is missing or damaged.
    """
    requests = [asdict(rundir.read_document(TrainRequest, each, rundir.REQUEST)) for each in runs]
    return {
        name: tuple(each[name] for each in requests)
        for name in requests[0]
        if name not in _NOT_COMPARED and len({json.dumps(each[name]) for each in requests}) > 1
    }


def results_side_by_side(runs: Sequence[Path]) -> dict[str, tuple[float | None, ...]]:
    """Return every figure that any of the runs has: name to one value a run.

    Raises:
        RunError: a run's manifest is damaged.
    """
    results: list[Mapping[str, float]] = [rundir.read_manifest(each).results for each in runs]
    names = dict.fromkeys(name for each in results for name in each)
    return {name: tuple(each.get(name) for each in results) for name in names}
