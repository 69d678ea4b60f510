"""Run as `python -m mst.training.worker RUN_DIRECTORY`: do what the plan says, and record it.

The worker reads the run directory and never probes or decides. It keeps the run's lock open, which
its parent handed down, and dies when its parent does.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst import rundir
from mst.data.prepare import Prepared, prepare
from mst.data.tokens import TOKENIZER_FILES
from mst.durable import sha256
from mst.errors import Interrupted, RunError
from mst.plan import Plan
from mst.request import TrainRequest
from mst.rundir import CHECKPOINTS, PLAN, REQUEST, RunManifest
from mst.training import checkpoint
from mst.training.checkpoint import TrainState
from mst.worker_process import StopAsked, die_with_parent, guarded

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mst.evaluate.labels import LabelAccuracy
    from mst.training.loop import Outcome, Session


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
    from mst.training.adapters import enable_checkpointing, load_model, lora_config, prepare_model

    model = load_model(Path(manifest.model_path), plan.weights_dtype, plan.attention, device)
    _seed(request.seed)
    model = prepare_model(model, lora_config(request) if plan.tuner == "lora" else None)
    if plan.gradient_checkpointing:
        enable_checkpointing(model)
    placed = {parameter.device.type for parameter in model.parameters()}
    # Other tools trained on the CPU without a word when they didn't know the chip.
    assert placed == {device.type}, f"the model is on {placed}, the plan says {device}"
    return model


def _measure(
    console: Console, model: torch.nn.Module, prepared: Prepared, plan: Plan, when: str
) -> LabelAccuracy | None:
    import torch

    from mst.evaluate.labels import chosen_rows, label_accuracy

    if not plan.label_accuracy or prepared.val is None or prepared.answers is None:
        return None
    rows = chosen_rows([each.row for each in prepared.val.examples])
    with console.status(f"measuring {when}") as status:

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


def _resume(run: Path, found: Path | None, session: Session, console: Console) -> TrainState:
    """Restore the checkpoint to go on from; set aside newer ones, damaged or not asked for.

    Args:
        run: the run directory.
        found: its newest whole checkpoint.
        session: takes over what the checkpoint holds.
        console: told what is done.
    """
    directory = run / CHECKPOINTS
    asked = session.request.resume
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
    if found is None:
        return TrainState()
    state = checkpoint.restore(
        found, session.model, session.optimizer, session.names, session.device
    )
    console.print(f"continuing after step {state.step} from {found.name}")
    return state


def _write_result(run: Path, plan: Plan, manifest: RunManifest, session: Session) -> Path:
    """Write the tuned adapter or model, with the tokenizer, so that it stands alone."""
    import torch

    name = "adapter" if plan.tuner == "lora" else "model"
    source = Path(manifest.model_path)

    def fill(part: Path) -> None:
        model = session.model
        if plan.tuner == "full":
            model = model.to(getattr(torch, plan.compute_dtype))
        checkpoint.write_weights(model, part)
        for each in (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
            if (source / each).is_file() and not (part / each).is_file():
                shutil.copyfile(source / each, part / each)

    checkpoint.write_sealed(run / name, fill)
    return run / name


def _finish(run: Path, outcome: Outcome, session: Session, console: Console) -> None:
    request, state = session.request, outcome.state
    best_wanted = request.load_best_model_at_end or outcome.ending == "early"
    if best_wanted and state.best_step is not None and state.best_step != state.step:
        checkpoint.load_weights(
            checkpoint.checkpoint_path(run / CHECKPOINTS, state.best_step), session.model
        )
        console.print(f"took the best weights, of step {state.best_step}")


def work(run: Path, stop: StopAsked) -> None:
    """Train the run in directory `run` to its end and record the outcome in its manifest.

    Raises:
        Interrupted: the user stopped it; it was saved.
        MstError: what the user can mend.
    """
    from rich.console import Console

    console = Console(highlight=False)
    request = rundir.read_document(TrainRequest, run, REQUEST)
    plan = rundir.read_document(Plan, run, PLAN)
    manifest = rundir.read_manifest(run)
    with console.status("loading the model and the data"):
        _activate(plan.backend)
        import torch

        device = torch.device(plan.torch_device)
        if device.type == "cpu":
            torch.set_num_threads(plan.threads)
        prepared = prepare(
            request, [each.path for each in manifest.data], Path(manifest.model_path), None
        )
        model = _load(manifest, plan, request, device)
    results = _train(run, console, stop, request, plan, manifest, prepared, model, device)
    files = {
        str(each.relative_to(run)): sha256(each)
        for name in ("adapter", "model")
        for each in sorted((run / name).glob("*"))
    }
    rundir.update_manifest(
        run, status="done", finished=rundir.now(), results=results, outputs=files, error=None
    )


def _train(
    run: Path,
    console: Console,
    stop: StopAsked,
    request: TrainRequest,
    plan: Plan,
    manifest: RunManifest,
    prepared: Prepared,
    model: torch.nn.Module,
    device: torch.device,
) -> dict[str, float]:
    from mst.training.device_memory import peak_bytes, reset_peak
    from mst.training.isolation import rows_stay_apart
    from mst.training.loop import make_session
    from mst.training.loop import run as run_loop
    from mst.training.report import MetricsFile, ProgressBar, Reporters

    packing = rows_stay_apart(model, prepared.tokenizer.vocab_size, device)
    checkpoints = run / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    checkpoint.discard_parts(checkpoints)
    before = dict(manifest.results)
    newest = checkpoint.newest_whole(checkpoints)
    measured = None if newest else _measure(console, model, prepared, plan, "before")
    if measured is not None:
        before |= _accuracies("before", measured)
        rundir.update_manifest(run, results=before)
    _seed(request.seed)

    def session_with(reporter: Reporters) -> Session:
        return make_session(
            model,
            device,
            packing,
            prepared.train.examples,
            prepared.val.examples if prepared.val else (),
            prepared.tokenizer.pad_token_id,
            plan,
            request,
            checkpoints,
            reporter,
            stop,
        )

    silent = session_with(Reporters())
    state = _resume(run, newest, silent, console)
    with rundir.metrics_writer(run, state.step) as file:
        bar = ProgressBar(console, plan.total_steps, state.step)
        metrics = MetricsFile(file, request.logging_steps)
        session = replace(silent, reporter=Reporters(metrics, bar))
        reset_peak(device)
        began = time.perf_counter()
        stop.in_loop = True
        try:
            outcome = run_loop(session, state)
        finally:
            stop.in_loop = False
            bar.close()
    seconds = time.perf_counter() - began
    peak = peak_bytes(device)
    if outcome.ending == "interrupted":
        raise Interrupted(
            f"stopped after step {outcome.state.step} of {plan.total_steps}; everything is saved."
            f" Go on with: mst train --output-dir {run} --resume"
        )
    _finish(run, outcome, session, console)
    after = _measure(console, model, prepared, plan, "after")
    results = before | _figures(outcome.state, seconds, peak, plan)
    if after is not None:
        results |= _accuracies("after", after) | _baseline(prepared)
    _write_result(run, plan, manifest, session)
    return results


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
        "peak_memory_bytes": float(peak),
        "predicted_memory_bytes": float(plan.memory.peak_bytes),
    }
    if state.best_loss is not None and state.best_step is not None:
        figures |= {"best_eval_loss": state.best_loss, "best_step": float(state.best_step)}
    return figures


def main(argv: list[str]) -> int:
    """Train one run directory."""
    die_with_parent()
    stop = StopAsked()
    run = Path(argv[0])
    return guarded(lambda: work(run, stop), run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
