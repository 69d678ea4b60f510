"""Becomes a peer: `python -m mst.bench.peer_worker RUN PEER PYTHON` prepares what it is to train.

The rows of each step are those of `mst train`, in its order, and the adapters begin with its
values. Then this process is replaced by the peer's interpreter, which stays in the same jail and
has the memory for itself; rows go through it in anonymous memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mst import rundir
from mst.bench.peer_run import RESULT
from mst.bench.peers import (
    PeerRefused,
    check_model,
    driver_command,
    handed_over,
    job_of,
    peer_environment,
)
from mst.plan import Plan
from mst.request import TrainRequest
from mst.worker_process import die_with_parent, guarded

if TYPE_CHECKING:
    from mst.data.encode import Example
    from mst.data.prepare import Prepared


def become(run: Path, name: str, python: str, environ: Mapping[str, str]) -> None:
    """Replace this process by a peer that trains what a run's plan says.

    Raises:
        MstError: the rows don't come out even, or the model can't be loaded.
    """
    from mst.data.prepare import has_images, prepare
    from mst.probe import activate
    from mst.registry import load
    from mst.training.objectives import find_objective
    from mst.training.schedule import warmup_steps

    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    plan = rundir.read_document(Plan, run, rundir.PLAN)
    manifest = rundir.read_manifest(run)
    registry = load()
    activate(registry, plan.backend)
    model = Path(manifest.model_path)
    check_model(name, model)
    objective = find_objective(request, registry)
    prepared = prepare(request, request.dataset, model, None, objective)
    if has_images(prepared):
        raise PeerRefused(f"{name} is measured on rows of text; these have images.")
    steps = rows_of_steps(prepared, plan, request.seed)
    save_adapters(run, model, plan, request)
    tokens = [sum(len(each.input_ids) for each in rows) for rows in steps]
    labels = sum(label != -100 for rows in steps for each in rows for label in each.labels)
    share = round(labels / max(1, sum(tokens)), 6)
    rundir.update_manifest(run, results={**manifest.results, "label_share": share})
    held_out = prepared.val.examples if prepared.val else ()
    job = job_of(
        plan,
        request,
        warmup_steps(plan.total_steps, request.warmup_ratio),
        [plain(each) for rows in steps for each in rows],
    ) | {
        "model": str(model), "adapter": str(run / "adapter"), "place": str(run),
        "metrics": str(run / rundir.METRICS), "result": str(run / RESULT), "tokens": tokens,
        "val_rows": [plain(each) for each in held_out],
    }  # fmt: skip
    there = peer_environment(environ, run, plan.threads)
    os.execve(python, driver_command(name, python, handed_over(job)), there)


def plain(row: Example) -> list[list[int]]:
    """Return a row's tokens and labels as lists."""
    return [list(row.input_ids), list(row.labels)]


def rows_of_steps(prepared: Prepared, plan: Plan, seed: int) -> list[list[Example]]:
    """Return the rows of each step, as `mst train` takes them.

    Raises:
        PeerRefused: an epoch's last step has fewer rows, where a peer would go on with the next.
    """
    from mst.training.order import row_sizes, step_rows

    rows = prepared.train.examples
    sizes = row_sizes(rows, None)
    batch = plan.global_batch
    found = [
        [rows[place] for (place,) in step_rows(sizes, step, batch, seed)]
        for step in range(plan.total_steps)
    ]
    short = next((step for step, each in enumerate(found, 1) if len(each) < batch), None)
    if short is not None:
        raise PeerRefused(
            f"step {short} of mst has {len(found[short - 1])} of {batch} rows, for an epoch of"
            f" {len(rows)} ends there, and peers fill it up. Give more rows, or ask for fewer steps"
            " or rows a step."
        )
    return found


def save_adapters(run: Path, model: Path, plan: Plan, request: TrainRequest) -> None:
    """Write fresh adapters with the values that `mst train` begins with."""
    import torch

    from mst.training.adapters import load_model, lora_config, prepare_model

    device = torch.device(plan.torch_devices[0])
    loaded = load_model(model, plan.weights_dtype, plan.attention, device)
    torch.manual_seed(request.seed)
    made = prepare_model(loaded, lora_config(request))
    made.save_pretrained(run / "adapter")  # type: ignore[operator]


def main(arguments: Sequence[str]) -> int:
    """Prepare, and become the peer; return the exit code of what failed before."""
    die_with_parent()
    run, name, python = arguments
    path = Path(run)
    return guarded(lambda: become(path, name, python, dict(os.environ)), path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
