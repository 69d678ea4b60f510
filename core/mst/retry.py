"""After a plan that did not fit: the next smaller one that trains the same thing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mst.candidates import attention_kernel
from mst.configuration import Configuration, checkpointing_option
from mst.memory import forecast
from mst.model.facts import ModelFacts
from mst.plan import MemoryForecast, Plan, Reason
from mst.quantities import gib
from mst.request import TrainRequest
from mst.sharing_choice import counted_on
from mst.workload import DataFacts, largest_step, layout_in, objective_costs

# The next plan must be smaller by more than the forecast is usually wrong.
SMALLER = 0.9


def configuration_of(plan: Plan, request: TrainRequest) -> Configuration:
    """Return what memory and time depend on, of a plan that was made, but for its objective."""
    return Configuration(
        tuner=plan.tuner,
        quantization=plan.quantization,
        compute_dtype=plan.compute_dtype,
        weights_dtype=plan.weights_dtype,
        lora_rank=request.lora_rank,
        target_modules=request.target_modules,
        use_dora=request.use_dora,
        optim=plan.optim,
        attention=plan.attention,
        checkpointing=plan.gradient_checkpointing,
        checkpointed_layers=plan.checkpointed_layers,
        strategy=plan.strategy,
        world_size=plan.world_size,
        offload=plan.offload,
        micro_batch=plan.per_device_train_batch_size,
        accumulation=plan.gradient_accumulation_steps,
        row_gradients=plan.privacy is not None,
        chunked_loss=plan.chunked_loss,
        heap=plan.heap,
        compiled=plan.compiled,
        async_save=plan.async_save,
        activation_offloading=plan.activation_offloading,
        block_attention=plan.block_attention,
    )


def next_smaller(
    plan: Plan, model: ModelFacts, data: DataFacts, request: TrainRequest
) -> Plan | None:
    """Return the next smaller plan, or None when nothing is smaller.

    The tuner, the dtypes, the devices and the global batch stay, so that the run goes on from its
    checkpoint with the losses that it would have had. The micro-batch shrinks first: it costs
    less time than to compute activations twice. Then all layers are recomputed, however few would
    do by the forecast, which was wrong once. What a checkpoint's copy takes is spared.

    Args:
        plan: that ran out of memory.
        model: its shape.
        data: its rows.
        request: what the run was asked.
    """
    failed = plan.memory.peak_bytes
    costs = objective_costs(data, request, plan.tuner)
    now = replace(configuration_of(plan, request), **costs)
    spared = now if request.async_save == "on" else replace(now, async_save=False)
    forecasts = [
        (made, _forecast(made, plan, model, data, request))
        for made in _smaller(spared)
        if made != now
    ]
    fitting = [each for each in forecasts if each[1].peak_bytes <= failed * SMALLER]
    # Nothing is that much smaller: the smallest is worth one try.
    made, memory = (
        fitting[0]
        if fitting
        else min(forecasts, key=lambda each: each[1].peak_bytes, default=(None, plan.memory))
    )
    if made is None or memory.peak_bytes >= failed:
        return None
    why = f"the plan before needed more than its {gib(failed)}"
    switch = checkpointing_option(made.checkpointing, made.checkpointed_layers)
    return replace(
        plan,
        per_device_train_batch_size=made.micro_batch,
        gradient_accumulation_steps=made.accumulation,
        gradient_checkpointing=made.checkpointing,
        checkpointed_layers=made.checkpointed_layers,
        async_save=made.async_save,
        memory=memory,
        reasons=(
            *plan.reasons,
            Reason("per_device_train_batch_size", str(made.micro_batch), why),
            Reason("gradient_checkpointing", switch, why),
        ),
    )


def _smaller(made: Configuration) -> Iterator[Configuration]:
    """Yield this configuration and smaller ones of the same global batch, the fastest first."""
    rows = made.micro_batch * made.accumulation
    sizes = [made.micro_batch >> n for n in range(made.micro_batch.bit_length())]
    for each in (made, replace(made, checkpointing=True, checkpointed_layers=None)):
        for size in sizes:
            if rows % size == 0:
                yield replace(each, micro_batch=size, accumulation=rows // size)


def _forecast(
    made: Configuration, plan: Plan, model: ModelFacts, data: DataFacts, request: TrainRequest
) -> MemoryForecast:
    step = largest_step(
        data,
        made.micro_batch,
        plan.global_batch,
        request.seed,
        plan.total_steps,
        layout_in(data, plan.attention, request.padding_free),
        plan.prefix_sharing and counted_on(model, data, request, plan.attention),
    )
    on_host = plan.torch_devices[0] == "cpu"
    kind = plan.torch_devices[0].partition(":")[0]
    return forecast(
        model,
        made,
        step,
        plan.memory.available_bytes,
        on_host,
        attention_kernel(kind),
        device=kind,
    )
