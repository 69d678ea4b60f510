"""Run as `python -m mst.training.worker RUN_DIRECTORY RANK MEETING`: do what the plan says.

A worker reads the run directory and never probes or decides. It keeps the run's lock open, which
its parent handed down, and dies when its parent does. The worker of rank 0 writes what the run
leaves and talks to the user; the others compute.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst import rundir
from mst.data.prepare import Prepared, prepare
from mst.data.tokens import TOKENIZER_FILES
from mst.durable import sha256
from mst.errors import Interrupted, OutOfMemory, PeerFailed, RunError
from mst.plan import Plan
from mst.request import TrainRequest
from mst.rundir import CHECKPOINTS, PLAN, REQUEST, ForecastMiss, RunManifest
from mst.training import checkpoint
from mst.training.adapters import (
    enable_checkpointing,
    load_model,
    lora_config,
    prepare_model,
    trained_parameters,
)
from mst.training.checkpoint import TrainState
from mst.training.faults import named
from mst.training.parallel import Group, join, leave, share_text, share_weights
from mst.worker_process import StopAsked, die_with_parent, guarded

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mst.evaluate.labels import LabelAccuracy
    from mst.training.loop import Outcome
    from mst.training.session import Session


def _activate(backend: str) -> None:
    from mst.probe import activate
    from mst.registry import load

    activate(load(), backend)


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _load(
    manifest: RunManifest, plan: Plan, request: TrainRequest, device: torch.device
) -> torch.nn.Module:
    with named(device, "while the model was being loaded"):
        model = load_model(
            Path(manifest.model_path),
            plan.weights_dtype,
            plan.attention,
            device,
            plan.quantization,
            plan.compute_dtype,
        )
        _seed(request.seed)
        model = prepare_model(model, None if plan.tuner == "full" else lora_config(request))
    if plan.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _measure(
    console: Console, model: torch.nn.Module, prepared: Prepared, plan: Plan, when: str
) -> LabelAccuracy | None:
    import torch

    from mst.evaluate.labels import chosen_rows, label_accuracy

    if not plan.label_accuracy or prepared.val is None or prepared.answers is None:
        return None
    rows = chosen_rows([each.row for each in prepared.val.examples])
    device = next(model.parameters()).device
    doing = f"while the accuracy was being measured {when} training"
    with console.status(f"measuring {when}") as status, named(device, doing):

        def show(done: int) -> None:
            status.update(f"measuring {when}: {done} of {len(rows)} held-out rows")

        found = label_accuracy(
            model,
            rows,
            prepared.answers,
            prepared.tokenizer,
            prepared.template,
            getattr(torch, plan.compute_dtype),
            show,
        )
    console.print(
        f"{when}: {found.restricted:.1%} right restricted to the {len(prepared.answers)} answers,"
        f" {found.free:.1%} right in free generation ({found.rows} held-out rows)"
    )
    return found


def _checkpoint_to_restore(run: Path, asked: str | None, console: Console) -> Path | None:
    """Return the checkpoint to go on from; set aside newer ones, damaged or not asked for.

    Args:
        run: the run directory.
        asked: by the user: "last", a path, or None.
        console: told what is done.

    Raises:
        RunError: the one that was asked for is not whole.
    """
    directory = run / CHECKPOINTS
    checkpoint.discard_parts(directory)
    found = checkpoint.newest_whole(directory)
    if asked not in (None, "last"):
        found = Path(str(asked))
        if not checkpoint.is_whole(found):
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
        session.model,
        session.optimizer,
        session.names,
        session.device,
        session.group.rank,
    )
    console.print(f"continuing after step {state.step} from {found.name}")
    return state


def _write_result(run: Path, plan: Plan, manifest: RunManifest, model: torch.nn.Module) -> Path:
    """Write the tuned adapter or model, with the tokenizer, so that it stands alone."""
    import torch

    name = "model" if plan.tuner == "full" else "adapter"
    source = Path(manifest.model_path)

    def fill(part: Path) -> None:
        whole = model.to(getattr(torch, plan.compute_dtype)) if plan.tuner == "full" else model
        checkpoint.write_weights(whole, part)
        for each in (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
            if (source / each).is_file() and not (part / each).is_file():
                shutil.copyfile(source / each, part / each)

    checkpoint.write_sealed(run / name, fill)
    return run / name


def work(run: Path, rank: int, meeting: str, stop: StopAsked) -> None:
    """Train the run in directory `run` to its end and record the outcome in its manifest.

    Args:
        run: the run directory.
        rank: this worker's place in the plan's devices.
        meeting: name of the file in `run` in which the ranks meet.
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
    with console.status("loading the model and the data"):
        _activate(plan.backend)
        import torch

        device = torch.device(plan.torch_devices[rank])
        if device.type == "cpu" or len(plan.torch_devices) > 1 or request.threads is not None:
            torch.set_num_threads(plan.threads)
        with named(device, "at its first use"):
            group = join(
                rank, len(plan.torch_devices), device, plan.distributed_backend, run / meeting
            )
        prepared = prepare(
            request, [each.path for each in manifest.data], Path(manifest.model_path), None
        )
        model = _load(manifest, plan, request, device)
    training = Training(run, console, stop, request, plan, manifest, prepared, model, device, group)
    outcome, figures = _train(training)
    leave(group)
    if group.first:
        _finish(training, outcome, figures)


@dataclass(frozen=True)
class Training:
    """What the parts of a worker's task share.

    Attributes:
        run: the run directory.
        console: where the user reads; silent but on rank 0.
        stop: says when the user wants the run to end.
        request: what was asked, spelt out.
        plan: what is done.
        manifest: as it was when the worker began.
        prepared: the encoded rows.
        model: ready to be trained, on `device`.
        device: of this rank.
        group: this rank's place.
    """

    run: Path
    console: Console
    stop: StopAsked
    request: TrainRequest
    plan: Plan
    manifest: RunManifest
    prepared: Prepared
    model: torch.nn.Module
    device: torch.device
    group: Group


def _train(training: Training) -> tuple[Outcome, dict[str, float]]:
    """Go through the loop; return how it ended, and the figures that were measured until then.

    Raises:
        Interrupted: the user stopped it; it was saved.
    """
    run, console, group = training.run, training.console, training.group
    (run / CHECKPOINTS).mkdir(exist_ok=True)
    asked, found = training.request.resume, None
    if group.first:
        found = _checkpoint_to_restore(run, asked, console)
    text = share_text(group, str(found) if found else "")
    found = Path(text) if text else None
    figures = dict(training.manifest.results)
    if group.first and found is None:
        figures |= _measured(training, "before")
        rundir.update_manifest(run, results=figures)
    session = _session(training)
    state = TrainState() if found is None else _restored(found, session, console)
    share_weights(group, (each for _, each in trained_parameters(training.model)))
    outcome, seconds, peak = _loop(training, session, state)
    if outcome.ending == "interrupted":
        if not group.first:
            raise PeerFailed
        raise Interrupted(
            f"stopped after step {outcome.state.step} of {training.plan.total_steps}; everything"
            f" is saved. Go on with: mst train --output-dir {run} --resume"
        )
    return outcome, figures | _figures(outcome.state, seconds, peak, training.plan)


def _session(training: Training) -> Session:
    """Return the loop's session, with a reporter that says nothing yet."""
    from mst.training.isolation import rows_stay_apart
    from mst.training.report import Reporters
    from mst.training.session import make_session

    prepared, request, rank = training.prepared, training.request, training.group.rank
    with named(training.device, "in a first forward pass"):
        packing = rows_stay_apart(training.model, prepared.tokenizer.vocab_size, training.device)
    # Each rank drops other activations; the adapters were drawn before, alike on all.
    _seed(request.seed + rank)
    return make_session(
        training.model,
        training.device,
        packing,
        prepared.train.examples,
        prepared.val.examples if prepared.val else (),
        prepared.tokenizer.pad_token_id,
        training.plan,
        request,
        training.run / CHECKPOINTS,
        Reporters(),
        training.stop,
        training.group,
    )


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


def _finish(training: Training, outcome: Outcome, figures: dict[str, float]) -> None:
    """Take the best weights if they were asked for, measure, and write the result."""
    run, request, state = training.run, training.request, outcome.state
    best_wanted = request.load_best_model_at_end or outcome.ending == "early"
    if best_wanted and state.best_step is not None and state.best_step != state.step:
        best = checkpoint.checkpoint_path(run / CHECKPOINTS, state.best_step)
        checkpoint.load_weights(best, training.model)
        training.console.print(f"took the best weights, of step {state.best_step}")
    measured = _measured(training, "after")
    if measured:
        figures = figures | measured | _baseline(training.prepared)
    result = _write_result(run, training.plan, training.manifest, training.model)
    files = {str(each.relative_to(run)): sha256(each) for each in sorted(result.glob("*"))}
    rundir.update_manifest(
        run, status="done", finished=rundir.now(), results=figures, outputs=files, error=None
    )


def _measured(training: Training, when: str) -> dict[str, float]:
    found = _measure(training.console, training.model, training.prepared, training.plan, when)
    return {} if found is None else _accuracies(when, found)


def _accuracies(when: str, found: LabelAccuracy) -> dict[str, float]:
    return {
        f"accuracy_{when}_restricted": found.restricted,
        f"accuracy_{when}_free": found.free,
        "accuracy_rows": float(found.rows),
    }


def _baseline(prepared: Prepared) -> dict[str, float]:
    from mst.evaluate.baseline import baseline_accuracy
    from mst.evaluate.labels import chosen_rows

    assert prepared.val is not None
    train = [each.row for each in prepared.train.examples]
    found = baseline_accuracy(train, chosen_rows([each.row for each in prepared.val.examples]))
    return {} if found is None else {"accuracy_baseline": found}


def _figures(state: TrainState, seconds: float, peak: int, plan: Plan) -> dict[str, float]:
    figures = {
        "steps": float(state.step),
        "tokens": float(state.tokens),
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(state.tokens / max(state.train_seconds, 1e-9), 1),
        "step_seconds": round(state.train_seconds / max(state.step, 1), 6),
        "peak_memory_bytes": float(peak),
        "predicted_memory_bytes": float(plan.memory.peak_bytes),
    }
    if state.best_loss is not None and state.best_step is not None:
        figures |= {"best_eval_loss": state.best_loss, "best_step": float(state.best_step)}
    return figures


def _judged(run: Path, rank: int, meeting: str, stop: StopAsked) -> None:
    """Do the work; where memory runs out, keep what the forecast had said."""
    try:
        work(run, rank, meeting, stop)
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
        )
        rundir.add_miss(run, miss)
        raise


def main(argv: list[str]) -> int:
    """Train one run directory, as one of its ranks."""
    die_with_parent()
    stop = StopAsked()
    run, rank, meeting = Path(argv[0]), int(argv[1]), argv[2]
    return guarded(lambda: _judged(run, rank, meeting, stop), run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
