"""What differential privacy leaves to choose: requests that it excludes are refused."""

from __future__ import annotations

from dataclasses import replace

from mst.errors import PlanError
from mst.request import TrainRequest
from mst.workload import DataFacts

TASKS = ("sft", "pt")


def confined(request: TrainRequest, data: DataFacts) -> TrainRequest:
    """Return a request for differential privacy with what it fixes: LoRA, on one device.

    Raises:
        PlanError: something that was asked for excludes it; names that, and why.
    """
    for option, why in _excluded(request, data):
        raise PlanError(
            f"--dp-epsilon {request.dp_epsilon:g} was asked for together with {option}: {why}"
        )
    return replace(request, tuner="lora", nproc_per_node=1, deepspeed="off")


def check_unused(request: TrainRequest) -> None:
    """Make sure that no option of differential privacy stands without `--dp-epsilon`.

    Raises:
        PlanError: one does.
    """
    for name, value in (("delta", request.dp_delta), ("unit", request.dp_unit)):
        if value is not None:
            raise PlanError(
                f"--dp-{name} {value} was given without --dp-epsilon, so nothing would be private."
                " Pass --dp-epsilon too, or leave it out."
            )


def _excluded(request: TrainRequest, data: DataFacts) -> list[tuple[str, str]]:
    """Return the options that exclude it, each with why and what to do."""
    several = (request.nproc_per_node or 1) * request.nnodes > 1
    selected = (
        "which weights are kept would depend on held-out rows, which no noise hides. Leave it out."
    )
    found = {
        f"--tuner {request.tuner}": (
            request.tuner not in ("auto", "lora") or request.quant_bits is not None,
            "gradients of single rows are taken of LoRA's adapters. Pass --tuner lora.",
        ),
        "--use-dora": (request.use_dora, "its magnitudes have no gradients of single rows."),
        f"--task {request.task}": (
            request.task not in TASKS,
            f"its loss compares rows or answers. Pass --task {' or '.join(TASKS)}.",
        ),
        "several devices": (several, "one draws and adds the noise. Pass --nproc-per-node 1."),
        f"--deepspeed {request.deepspeed}": (
            request.deepspeed not in ("auto", "off"),
            "it adds gradients up before they can be clipped. Pass --deepspeed off.",
        ),
        "--packing": (request.packing, "a unit's gradient must stay apart. Leave it out."),
        "--streaming": (request.streaming, "units are drawn from all. Leave it out."),
        "rows with images": (data.images > 0, "they are not supported. Remove them."),
        "--dtype float16": (
            request.dtype == "float16",
            "loss scaling would depend on the rows. Pass --dtype bfloat16 or float32.",
        ),
        "--max-grad-norm 0": (
            request.max_grad_norm == 0,
            "the noise is measured by the norm to which gradients are clipped. Pass 1.",
        ),
        "--early-stopping-patience": (request.early_stopping_patience is not None, selected),
        "--load-best-model-at-end": (request.load_best_model_at_end, selected),
    }
    return [(option, why) for option, (there, why) in found.items() if there]
