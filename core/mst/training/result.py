"""What a run ends with: its accuracy, its figures, and the tuned weights on disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mst import rundir
from mst.configuration import ZERO_STAGES
from mst.data.prepare import Prepared
from mst.data.tokens import TOKENIZER_FILES
from mst.durable import sha256
from mst.model.processor import PROCESSOR_FILES
from mst.plan import Plan
from mst.privacy.draws import KEY_FILE
from mst.rundir import CHECKPOINTS
from mst.training import checkpoint, lora_init
from mst.training import zero as sharded
from mst.training.faults import free_memory, named
from mst.training.reference import as_before
from mst.training.sealed_directory import write_sealed
from mst.waiting import told_while

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mst.evaluate.labels import LabelAccuracy
    from mst.training.loop import Outcome
    from mst.training.session import Session
    from mst.training.task import Training


def finish(
    training: Training, session: Session, outcome: Outcome, figures: dict[str, float]
) -> None:
    """Take the best weights if they were asked for, measure, and write the result.

    Under DeepSpeed every rank takes part; else rank 0 alone.
    """
    run, request, state = training.run, training.request, outcome.state
    zero, first = session.zero, training.group.first
    best_wanted = request.load_best_model_at_end or outcome.ending == "early"
    if best_wanted and state.best_step is not None and state.best_step != state.step:
        best = checkpoint.checkpoint_path(run / CHECKPOINTS, state.best_step)
        if zero is None:
            checkpoint.load_weights(best, training.model, training.keys)
        else:
            checkpoint.restore_weights(best, training.model, training.group, zero, training.keys)
        training.console.print(f"took the best weights, of step {state.best_step}")
    weights = None if zero is None else sharded.weights(zero, training.group)
    # What measuring needs would come on top of what the last steps have left.
    free_memory(training.device)
    measured: dict[str, float] = {}
    if first or training.plan.strategy == "zero3":
        if taken_off_at_the_end(training) and "accuracy_before_free" not in figures:
            with as_before(training.model):
                measured |= measured_accuracy(training, "before")
        measured |= measured_accuracy(training, "after")
    if not first:
        return
    stats = training.prepared.train.stats
    if stats.tokens:
        figures = figures | {"label_share": round(stats.label_tokens / stats.tokens, 6)}
    if measured:
        figures = figures | measured | _baseline(training.prepared)
    result = _write_result(training, weights)
    files = {str(each.relative_to(run)): sha256(each) for each in sorted(result.glob("*"))}
    rundir.update_manifest(
        run, status="done", finished=rundir.now(), results=figures, outputs=files, error=None
    )
    # Who has the key can take the noise off.
    (run / KEY_FILE).unlink(missing_ok=True)


def _write_result(training: Training, weights: Mapping[str, torch.Tensor] | None) -> Path:
    """Write the tuned adapter or model, with the tokenizer, so that it stands alone.

    Args:
        training: what was done.
        weights: the trained ones by name, where DeepSpeed has shared them out.
    """
    import torch

    plan, keys = training.plan, training.keys
    source = Path(training.manifest.model_path)

    def fill(part: Path) -> None:
        whole, trained = training.model, weights
        if plan.tuner == "full":
            dtype = getattr(torch, plan.compute_dtype)
            if trained is None:
                whole = whole.to(dtype)
            else:
                trained = {name: each.to(dtype) for name, each in trained.items()}
        checkpoint.write_weights(whole, part, trained, keys)
        beside = ("chat_template.jinja", "generation_config.json")
        for each in (*TOKENIZER_FILES, *PROCESSOR_FILES, *beside):
            if (source / each).is_file() and not (part / each).is_file():
                shutil.copyfile(source / each, part / each)

    target = training.run / ("model" if plan.tuner == "full" else "adapter")
    write_sealed(target, fill, keys)
    return target


def taken_off_at_the_end(training: Training) -> bool:
    """Return whether the adapter, switched off, shows the model as it was before training.

    Nobody then waits for that before the first step. Adapters that begin with what quantization
    has lost are part of what there was, and DeepSpeed's engine holds no model of its own.
    """
    plan = training.plan
    begun = lora_init.wanted(plan.quantization, training.request)
    return plan.tuner != "full" and not begun and not ZERO_STAGES[plan.strategy]


def measured_accuracy(training: Training, when: str) -> dict[str, float]:
    """Return the accuracy over the set of answers, as the manifest names it; {} without one.

    Args:
        training: its model is measured.
        when: "before" or "after" training.
    """
    found = _measure(training.console, training.model, training.prepared, training.plan, when)
    return {} if found is None else _accuracies(when, found)


def _measure(
    console: Console, model: torch.nn.Module, prepared: Prepared, plan: Plan, when: str
) -> LabelAccuracy | None:
    import torch

    from mst.evaluate.labels import ROWS_A_PASS, chosen_rows, label_accuracy

    if not plan.label_accuracy or prepared.val is None or prepared.answers is None:
        return None
    rows = chosen_rows([each.row for each in prepared.val.examples])
    device = next(model.parameters()).device
    doing = f"while the accuracy was being measured {when} training"
    with told_while(console, f"measuring {when}") as tell, named(device, doing):

        def show(done: int) -> None:
            tell(f"measuring {when}: {done} of {len(rows)} held-out rows")

        found = label_accuracy(
            model,
            rows,
            prepared.answers,
            prepared.tokenizer,
            prepared.template,
            getattr(torch, plan.compute_dtype),
            show,
            # The forecast knows a step of so many rows; without gradients they take less.
            min(ROWS_A_PASS, plan.per_device_train_batch_size),
        )
    console.print(
        f"{when}: {found.restricted:.1%} right restricted to the {len(prepared.answers)} answers,"
        f" {found.free:.1%} right in free generation ({found.rows} held-out rows)"
    )
    return found


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


def loop_figures(
    outcome: Outcome, seconds: float, peak: int, plan: Plan, goal: str
) -> dict[str, float]:
    """Return the loop's figures, as the manifest names them.

    Args:
        outcome: of the loop.
        seconds: that it took.
        peak: memory in bytes.
        plan: what was forecast.
        goal: of the objective, as `Objective.goal`.
    """
    # A device's context is the driver's: torch's allocator, which is measured, does not see it.
    state = outcome.state
    apart = 0 if "cpu" in plan.torch_devices else plan.memory.runtime_bytes
    figures = {
        "steps": float(state.step),
        "tokens": float(state.tokens),
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(state.tokens / max(state.train_seconds, 1e-9), 1),
        "step_seconds": round(state.train_seconds / max(state.step, 1), 6),
        "peak_memory_bytes": float(peak),
        "predicted_memory_bytes": float(plan.memory.peak_bytes - apart),
    }
    if state.best_loss is not None and state.best_step is not None:
        best = {f"best_eval_{goal}": -state.best_loss} if goal else {}
        best = best or {"best_eval_loss": state.best_loss}
        figures |= {**best, "best_step": float(state.best_step)}
    if outcome.evaluation is not None:
        found = outcome.evaluation
        figures |= {"last_eval_loss": found.eval_loss, "last_eval_step": float(found.step)}
        figures |= {f"eval_{name}": value for name, value in found.metrics.items()}
    return figures
