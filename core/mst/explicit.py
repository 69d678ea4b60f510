"""A plan's choices as explicit options of a request."""

from __future__ import annotations

from dataclasses import replace

from mst.configuration import ZERO_CHOICES, checkpointing_option
from mst.plan import Plan
from mst.request import TrainRequest


def as_explicit(request: TrainRequest, plan: Plan) -> TrainRequest:
    """Return the request with the plan's choices spelt out, so that a resumed run keeps them."""
    return replace(
        request,
        tuner=plan.tuner,
        dtype=plan.compute_dtype,
        max_length=plan.max_length,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        gradient_checkpointing=checkpointing_option(
            plan.gradient_checkpointing, plan.checkpointed_layers
        ),
        nproc_per_node=len(plan.torch_devices),
        quant_bits={"nf4": 4, "int8": 8}.get(plan.quantization),
        optim=plan.optim,
        deepspeed=_zero_option(plan) if request.deepspeed in ZERO_CHOICES else request.deepspeed,
        learning_rate=plan.learning_rate,
        threads=plan.threads if "cpu" in plan.torch_devices else request.threads,
        label_accuracy="on" if plan.label_accuracy else "off",
        chunked_cross_entropy="auto" if plan.chunked_loss else "off",
        torch_compile="on" if plan.compiled else "off",
        use_liger_kernel="on" if plan.liger else "off",
        prefix_sharing="auto" if plan.prefix_sharing else "off",
        block_attention="auto" if plan.block_attention else "off",
    )


def _zero_option(plan: Plan) -> str:
    """Return what `--deepspeed` would have to say for the plan's strategy."""
    if not plan.strategy.startswith("zero"):
        return "off"
    return plan.strategy + ("_offload" if plan.offload != "none" else "")
