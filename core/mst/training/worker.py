"""Run as `python -m mst.training.worker RUN_DIRECTORY RANK MEETING [KEYS]`: do what the plan says.

A worker reads the run directory and never probes or decides. It keeps the run's lock open, which
its parent handed down, and dies when its parent does. The worker of rank 0 writes what the run
leaves and talks to the user; the others compute.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst import rundir
from mst.configuration import ZERO_STAGES
from mst.data.prepare import Prepared, prepare
from mst.data.rows import changed_files
from mst.data.streaming import StreamedRows
from mst.errors import Interrupted, OutOfMemory, PeerFailed, RunError
from mst.extensions import hide_packages
from mst.plan import Plan
from mst.request import TrainRequest
from mst.rundir import CHECKPOINTS, PLAN, REQUEST, ForecastMiss, RunManifest
from mst.seal.keys.ring import NO_KEYS, KeyRing, inherited
from mst.seal.keys.run_key import run_keys
from mst.training import checkpoint, lora_init
from mst.training.activation_offloading import offload_activations
from mst.training.adapters import (
    enable_checkpointing,
    load_model,
    lora_config,
    prepare_model,
    trained_parameters,
)
from mst.training.begin import session_of
from mst.training.checkpoint import TrainState
from mst.training.faults import named
from mst.training.meeting import meeting_place
from mst.training.objectives import find_objective
from mst.training.parallel import (
    join,
    leave,
    peers_may_fail,
    share_text,
    share_weights,
)
from mst.training.private_step import begin_private_steps
from mst.training.result import (
    finish,
    loop_figures,
    measured_accuracy,
    taken_off_at_the_end,
)
from mst.training.task import Training
from mst.worker_process import StopAsked, die_with_parent, guarded

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mst.objective import Objective
    from mst.registry import Registry
    from mst.training.loop import Outcome
    from mst.training.session import Session


def _activated(backend: str) -> Registry:
    """Load the backend's torch code, and return the plugins."""
    from mst.probe import activate
    from mst.registry import load

    registry = load()
    activate(registry, backend)
    return registry


def _packages(plan: Plan) -> tuple[str, ...]:
    """Return the optional packages that the plan needs; others cost seconds and make caches."""
    eight_bit = plan.quantization != "none" or plan.optim != "adamw_torch"
    found = ("bitsandbytes",) if eight_bit else ()
    return (*found, "deepspeed") if ZERO_STAGES[plan.strategy] else found


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _load(
    manifest: RunManifest,
    plan: Plan,
    request: TrainRequest,
    device: torch.device,
    prepared: Prepared,
) -> torch.nn.Module:
    import torch

    _seed(request.seed)  # of a reward model's new head
    with named(device, "while the model was being loaded"):
        # ZeRO-3 takes the model from the host weight by weight: no device holds it whole.
        place = torch.device("cpu") if plan.strategy == "zero3" else device
        model = load_model(
            Path(manifest.model_path),
            plan.weights_dtype,
            plan.attention,
            place,
            plan.quantization,
            plan.compute_dtype,
            prepared.tokenizer.pad_token_id if prepared.objective.scores else None,
        )
        _seed(request.seed)
        model = prepare_model(model, None if plan.tuner == "full" else lora_config(request))
    if plan.block_attention:
        from mst.training.block_attention import use_block_attention

        use_block_attention()
    if plan.gradient_checkpointing:
        enable_checkpointing(model, plan.checkpointed_layers, plan.privacy is not None)
    if plan.activation_offloading:
        offload_activations(model, device)
    return model


def _data(
    request: TrainRequest,
    manifest: RunManifest,
    objective: Objective,
    keys: KeyRing = NO_KEYS,
) -> Prepared:
    """Return the data that was planned with.

    Raises:
        RunError: it is other data by now, or on this machine.
    """
    prepared = prepare(request, request.dataset, Path(manifest.model_path), None, objective, keys)
    changed = changed_files(
        (*manifest.data, *manifest.val_data), (*prepared.files, *prepared.val_files)
    )
    if changed:
        raise RunError(
            f"{changed[0]}, or an image that it names, is not what it was when the run was planned."
            " Put it back as it was, or start a new run in another --output-dir."
        )
    return prepared


def _checkpoint_to_restore(
    run: Path, asked: str | None, keys: KeyRing, console: Console
) -> Path | None:
    """Return the checkpoint to go on from; set aside newer ones, damaged or not asked for.

    Args:
        run: the run directory.
        asked: by the user: "last", a path, or None.
        keys: of an encrypted run.
        console: told what is done.

    Raises:
        RunError: the one that was asked for is not whole.
    """
    directory = run / CHECKPOINTS
    checkpoint.discard_parts(directory)
    found = checkpoint.newest_whole(directory, keys)
    if asked not in (None, "last"):
        found = Path(str(asked))
        if not checkpoint.is_whole(found, keys):
            raise RunError(
                f"--resume {found} is no whole checkpoint. Pass --resume without a path for the"
                f" newest whole one of {run}."
            )
    newer = [each for each in checkpoint.listed(directory) if not found or each.name > found.name]
    for each in newer:
        console.print(f"set {each.name} aside, in {rundir.SET_ASIDE}")
        checkpoint.set_aside(each, run / rundir.SET_ASIDE)
    return found


def _restored(found: Path, session: Session, console: Console) -> TrainState:
    """Take over what the checkpoint holds, on every rank."""
    state = checkpoint.restore(
        found,
        session.zero.engine.module if session.zero else session.model,
        session.optimizer,
        session.names,
        session.device,
        session.group,
        session.zero,
        session.keys,
    )
    console.print(f"continuing after step {state.step} from {found.name}")
    return state


def work(run: Path, rank: int, meeting: str, stop: StopAsked, keys: KeyRing = NO_KEYS) -> None:
    """Train the run in directory `run` to its end and record the outcome in its manifest.

    Args:
        run: the run directory.
        rank: this worker's place in the plan's devices.
        meeting: name of the file in `run` in which the ranks meet, or their store as JSON.
        stop: says when the user wants the run to end.

    Raises:
        Interrupted: the user stopped it; it was saved.
        MstError: what the user can mend.
    """
    from rich.console import Console

    console = Console(highlight=False, quiet=rank > 0)
    request = rundir.read_document(TrainRequest, run, REQUEST)
    plan = rundir.read_document(Plan, run, PLAN)
    manifest = rundir.read_manifest(run)
    hide_packages(keep=_packages(plan))
    with console.status("loading the model and the data"):
        registry = _activated(plan.backend)
        import torch

        device = torch.device(plan.torch_devices[rank % len(plan.torch_devices)])
        if device.type == "cpu" or len(plan.torch_devices) > 1 or request.threads is not None:
            torch.set_num_threads(plan.threads)
        with named(device, "at its first use"):
            group = join(
                rank,
                plan.world_size,
                device,
                plan.distributed_backend,
                meeting_place(meeting, run, rank, plan.world_size),
                always=ZERO_STAGES[plan.strategy] > 0,
            )
        prepared = _data(request, manifest, find_objective(request, registry), keys)
        model = _load(manifest, plan, request, device, prepared)
        if lora_init.wanted(plan.quantization, request):
            with named(device, "while the adapters were being made"):
                place = next(model.parameters()).device
                lora_init.begin_with_error(
                    model, Path(manifest.model_path), prepared.train.examples, place
                )
    own = run_keys(run, keys) if request.encrypt_run and group.first else NO_KEYS
    training = Training(
        run, console, stop, request, plan, manifest, prepared, model, device, group, own
    )
    session, outcome, figures = _train(training)
    if session.zero is None:
        leave(group)
        if group.first:
            finish(training, session, outcome, figures)
    else:
        with peers_may_fail(device):
            finish(training, session, outcome, figures)
        leave(group)


def _train(training: Training) -> tuple[Session, Outcome, dict[str, float]]:
    """Go through the loop; return it, how it ended, and the figures measured until then.

    Raises:
        Interrupted: the user stopped it; it was saved.
    """
    run, console, group = training.run, training.console, training.group
    (run / CHECKPOINTS).mkdir(exist_ok=True)
    asked, found = training.request.resume, None
    if group.first:
        found = _checkpoint_to_restore(run, asked, training.keys, console)
    text = share_text(group, str(found) if found else "")
    found = Path(text) if text else None
    figures = dict(training.manifest.results)
    # Where no rank holds the whole model, all of them measure, in step.
    together = training.plan.strategy == "zero3"
    session = session_of(training) if together else None
    if found is None and (group.first or together) and not taken_off_at_the_end(training):
        figures |= measured_accuracy(training, "before")
        if group.first:
            rundir.update_manifest(run, results=figures)
    session = session or session_of(training)
    if training.plan.privacy is not None:
        budget, resumed = training.plan.privacy, found is not None
        with named(training.device, "while gradients of single rows were tried"):
            private = begin_private_steps(session, budget, run, resumed)
        session = replace(session, private=private)
    state = TrainState() if found is None else _restored(found, session, console)
    if session.zero is None:
        share_weights(group, (each for _, each in trained_parameters(training.model)))
    outcome, seconds, peak = _loop(training, session, state)
    if isinstance(training.prepared.train.examples, StreamedRows):
        for reason, rows in training.prepared.train.examples.left_out().items():
            console.print(f"{rows} of the rows that were read taught nothing: {reason}")
    if outcome.ending == "interrupted":
        if not group.first:
            raise PeerFailed
        raise Interrupted(
            f"stopped after step {outcome.state.step} of {training.plan.total_steps}; everything"
            f" is saved. Go on with: mst train --output-dir {run} --resume"
        )
    goal = training.prepared.objective.goal
    return session, outcome, figures | loop_figures(outcome, seconds, peak, training.plan, goal)


def _loop(training: Training, silent: Session, state: TrainState) -> tuple[Outcome, float, int]:
    """Run the loop; return its outcome, its seconds and the peak of its memory in bytes."""
    from mst.training.device_memory import peak_bytes, reset_peak
    from mst.training.loop import run as run_loop
    from mst.training.report import MetricsFile, ProgressBar, Reporters

    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        session = silent
        if training.group.first:
            file = stack.enter_context(rundir.metrics_writer(training.run, state.step))
            bar = ProgressBar(training.console, training.plan.total_steps, state.step)
            stack.callback(bar.close)
            metrics = MetricsFile(file, training.request.logging_steps)
            session = replace(silent, reporter=Reporters(metrics, bar))
        reset_peak(training.device)
        training.stop.in_loop = True
        try:
            outcome = run_loop(session, state)
        finally:
            training.stop.in_loop = False
    return outcome, time.perf_counter() - began, peak_bytes(training.device)


def _judged(run: Path, rank: int, meeting: str, stop: StopAsked, keys: KeyRing) -> None:
    """Do the work; where memory runs out, keep what the forecast had said."""
    try:
        work(run, rank, meeting, stop, keys)
    except OutOfMemory as error:
        plan = rundir.read_document(Plan, run, PLAN)
        miss = ForecastMiss(
            step=error.step,
            micro_batch=error.micro_batch or plan.per_device_train_batch_size,
            checkpointing=plan.gradient_checkpointing,
            forecast_bytes=plan.memory.peak_bytes,
            measured_bytes=error.peak_bytes,
            available_bytes=plan.memory.available_bytes,
            cause="out of memory",
            when=rundir.now(),
            checkpointed_layers=plan.checkpointed_layers,
        )
        rundir.add_miss(run, miss)
        raise


def main(argv: list[str]) -> int:
    """Train one run directory, as one of its ranks."""
    die_with_parent()
    stop = StopAsked()
    run, rank, meeting = Path(argv[0]), int(argv[1]), argv[2]
    keys = inherited(int(argv[3]) if len(argv) > 3 else None)
    return guarded(lambda: _judged(run, rank, meeting, stop, keys), run)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk by now. DeepSpeed keeps process groups whose threads gloo does not end:
    # in one run of twenty the interpreter's own way out aborted (SIGABRT) after a good job.
    os._exit(code)
