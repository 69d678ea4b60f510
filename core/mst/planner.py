"""The planner: a pure function from facts, model, data and request to a plan with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mst.errors import PlanError
from mst.facts import Capabilities, DeviceFacts, torch_names
from mst.memory import FLOAT_BYTES, StepShape, forecast
from mst.model.facts import ModelFacts
from mst.plan import MemoryForecast, Plan, Reason
from mst.request import TrainRequest
from mst.training.batches import batch_shape, is_packed, step_micro_batches

# Row lengths vary, so a micro-batch is sized by tokens: enough to fill the matrix units, few
# enough that the dense mask of a packed batch stays small (SmolLM2 on two cores: 512 to 1024).
MICRO_BATCH_TOKENS = 640
GLOBAL_BATCH_ROWS = 16
# LoRA wants about ten times the rate of full tuning (Schulman et al. 2025, "LoRA Without Regret").
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}
# The share of the free memory that a plan may fill: the forecast leaves out fragmentation.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class DataFacts:
    """What the planner needs to know of the encoded rows.

    Attributes:
        lengths: tokens of each training row.
        label_tokens: of these, how many carry loss.
        val_rows: rows held out.
        answers: distinct answers when the set is a classification, else None.
        max_length: longest row that was accepted.
        longest: longest row that was found, accepted or not.
        deleted: rows left out because they were longer.
    """

    lengths: tuple[int, ...]
    label_tokens: tuple[int, ...]
    val_rows: int
    answers: int | None
    max_length: int
    longest: int
    deleted: int


def largest_step(
    data: DataFacts, micro_batch: int, global_batch: int, seed: int, steps: int
) -> StepShape:
    """Return the largest micro-batch that the run will meet: the order is known beforehand."""
    per_epoch = -(-len(data.lengths) // global_batch)
    tokens = labels = mask = 0
    # Past a few epochs the largest meeting of long rows has been seen; it only creeps up.
    for step in range(min(steps, 3 * per_epoch)):
        batches = step_micro_batches(len(data.lengths), step, micro_batch, global_batch, seed)
        for rows in batches:
            lengths = [data.lengths[i] for i in rows]
            height, width = batch_shape(lengths, packing=True)
            tokens = max(tokens, height * width)
            mask = max(mask, width * width if is_packed(lengths, packing=True) else 0)
            labels = max(labels, sum(data.label_tokens[i] for i in rows))
    return StepShape(tokens, labels, mask)


def _dtype(device: DeviceFacts, asked: str) -> tuple[str, Reason | None]:
    if asked != "auto":
        if asked not in device.dtypes:
            raise PlanError(
                f"--dtype {asked} was asked for; {device.name} trains in"
                f" {', '.join(device.dtypes)}. Pass one of these, or --dtype auto."
            )
        return asked, None
    known = [each for each in device.dtypes if each in FLOAT_BYTES]
    if not known:
        raise PlanError(
            f"{device.name} offers {', '.join(device.dtypes) or 'no dtype'}; mst trains in"
            f" {', '.join(FLOAT_BYTES)}. Choose another --device (`mst devices` lists them)."
        )
    features = f" ({', '.join(device.features)})" if device.features else ""
    return known[0], Reason("dtype", known[0], f"the fastest that {device.name} has{features}")


def _attention(request: TrainRequest, capabilities: Capabilities, dtype: str) -> str:
    # transformers' name for kernels that take half precision only (its check of `dtype`).
    offered = [
        each
        for each in capabilities.attention
        if dtype != "float32" or not each.startswith("flash_attention")
    ]
    asked = request.attn_implementation
    if asked != "auto" and asked not in offered:
        raise PlanError(
            f"--attn-implementation {asked} was asked for; in {dtype} this device offers"
            f" {', '.join(offered) or 'none'}. Pass one of these, or auto."
        )
    if not offered:
        raise PlanError(f"the backend offers no attention for {dtype}. Pass another --dtype.")
    return offered[0] if asked == "auto" else asked


def _batch(request: TrainRequest, data: DataFacts, ranks: int) -> tuple[int, int, list[Reason]]:
    reasons = []
    mean = sum(data.lengths) / len(data.lengths)
    size = request.per_device_train_batch_size
    if size is None:
        by_tokens = max(1, min(GLOBAL_BATCH_ROWS, round(MICRO_BATCH_TOKENS / mean)))
        size = min(2 ** int(math.log2(by_tokens)), len(data.lengths))
        why = f"rows have {mean:.0f} tokens on average; about {MICRO_BATCH_TOKENS} a micro-batch"
        reasons.append(Reason("per_device_train_batch_size", str(size), why))
    accumulation = request.gradient_accumulation_steps
    if accumulation is None:
        accumulation = max(1, min(GLOBAL_BATCH_ROWS, len(data.lengths)) // (size * ranks))
        why = f"{size * accumulation * ranks} rows an optimizer step"
        reasons.append(Reason("gradient_accumulation_steps", str(accumulation), why))
    return size, accumulation, reasons


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


@dataclass(frozen=True)
class _Draft:
    batch_size: int
    accumulation: int
    checkpointing: bool
    memory: MemoryForecast


def _fit(
    model: ModelFacts,
    request: TrainRequest,
    data: DataFacts,
    device: DeviceFacts,
    tuner: str,
    dtypes: tuple[str, str],
    batch: tuple[int, int],
    ranks: int,
) -> tuple[_Draft, list[Reason]]:
    """Return the first of ever smaller configurations that fits, and why it was needed.

    Raises:
        PlanError: none fits; names the smallest and what it would take.
    """
    available = device.memory_free_bytes
    on_host = device.backend == "cpu"
    if on_host and available is not None:
        available //= ranks  # they share the machine's memory
    limit = math.inf if available is None else available * MEMORY_SHARE
    free_size = request.per_device_train_batch_size is None
    sizes = [batch[0]]
    while free_size and sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}
    drafts = []
    for checkpointing in switches[request.gradient_checkpointing]:
        for size in sizes:
            accumulation = batch[1]
            if request.gradient_accumulation_steps is None:
                accumulation = max(1, batch[0] * batch[1] // size)
            global_batch = size * accumulation * ranks
            steps = _total_steps(request, len(data.lengths), global_batch)
            shape = largest_step(data, size, global_batch, request.seed, steps)
            memory = forecast(
                model, tuner, *dtypes, request.lora_rank, request.target_modules,
                checkpointing, shape, available, on_host,
            )  # fmt: skip
            drafts.append(_Draft(size, accumulation, checkpointing, memory))
            if memory.peak_bytes <= limit:
                return drafts[-1], _fit_reasons(drafts, request, limit)
    least = min(drafts, key=lambda each: each.memory.peak_bytes)
    advice = "a smaller --max-length, --tuner lora" if tuner == "full" else "a smaller --max-length"
    raise PlanError(
        f"{tuner} tuning of {model.path} needs {_gib(least.memory.peak_bytes)} at the least"
        f" (micro-batch {least.batch_size}, gradient checkpointing"
        f" {'on' if least.checkpointing else 'off'}); {device.name} has {_gib(available or 0)}"
        f" free, of which {MEMORY_SHARE:.0%} may be planned. Try {advice}, or a smaller model."
    )


def _fit_reasons(drafts: Sequence[_Draft], request: TrainRequest, limit: float) -> list[Reason]:
    chosen = drafts[-1]
    peak = _gib(chosen.memory.peak_bytes)
    reasons = []
    if request.gradient_checkpointing == "auto":
        why = f"needs {peak} without it"
        if chosen.checkpointing:
            without = min(each.memory.peak_bytes for each in drafts if not each.checkpointing)
            why = f"needs {_gib(without)} without it, {peak} with it"
        if math.isfinite(limit):
            why += f"; {_gib(limit)} may be used"
        value = "on" if chosen.checkpointing else "off"
        reasons.append(Reason("gradient_checkpointing", value, why))
    if chosen.batch_size != drafts[0].batch_size:
        why = f"{drafts[0].batch_size} rows would need {_gib(drafts[0].memory.peak_bytes)}"
        reasons.append(Reason("per_device_train_batch_size", str(chosen.batch_size), why))
    return reasons


def _total_steps(request: TrainRequest, rows: int, global_batch: int) -> int:
    steps = math.ceil(request.num_train_epochs * math.ceil(rows / global_batch))
    return request.max_steps if request.max_steps is not None else max(1, steps)


def _tuner(request: TrainRequest, model: ModelFacts) -> tuple[str, Reason | None]:
    if request.tuner != "auto":
        return request.tuner, None
    if request.use_dora or request.use_rslora:
        return "lora", Reason("tuner", "lora", "a variant of LoRA was asked for")
    full = model.parameters * (4 + 4 + 8)
    why = (
        f"full tuning would hold {_gib(full)} of weights, gradients and moments;"
        f" LoRA (rank {request.lora_rank}, alpha {request.lora_alpha:g}) forgets less and gives a"
        " file of megabytes. --tuner full overrides"
    )
    return "lora", Reason("tuner", "lora", why)


def _label_accuracy(request: TrainRequest, data: DataFacts) -> tuple[bool, Reason | None]:
    if request.label_accuracy == "off":
        return False, None
    possible = data.answers is not None and data.val_rows > 0
    if request.label_accuracy == "on" and not possible:
        raise PlanError(
            "--label-accuracy on was asked for; the data has"
            f" {data.answers or 'too many'} distinct answers and {data.val_rows} held-out rows."
            " It needs one short answer a row out of at most 64, and --val-size above 0."
        )
    if not possible:
        return False, None
    why = f"the answers are {data.answers} distinct ones, so accuracy can be counted"
    return True, Reason("label_accuracy", "on", why)


def _warnings(request: TrainRequest, data: DataFacts, steps: int, global_batch: int) -> list[str]:
    warnings = []
    if data.deleted:
        warnings.append(
            f"{data.deleted} rows are longer than {data.max_length} tokens (the longest has"
            f" {data.longest}) and are left out; --max-length or --truncation-strategy right"
            " would keep them"
        )
    if request.early_stopping_patience is not None and not data.val_rows:
        warnings.append("early stopping has no held-out rows to look at; pass --val-size")
    if steps * global_batch < len(data.lengths):
        warnings.append(
            f"{steps} steps of {global_batch} rows see only part of {len(data.lengths)} rows"
        )
    return warnings


def _check_context(model: ModelFacts, data: DataFacts) -> None:
    context = model.max_position_embeddings
    if context is not None and data.max_length > context:
        raise PlanError(
            f"--max-length {data.max_length} exceeds the model's context of {context} tokens."
            f" Pass --max-length {context} or less."
        )


def _strategy(
    devices: Sequence[DeviceFacts], capabilities: Sequence[Capabilities]
) -> tuple[str, Reason | None]:
    if len(devices) == 1:
        return "single", None
    for each, able in zip(devices, capabilities, strict=True):
        if "ddp" not in able.strategies:
            raise PlanError(
                f"--nproc-per-node {len(devices)} was asked for; {each.name} can do"
                f" {', '.join(able.strategies)}, which is not ddp. Pass --nproc-per-node 1."
            )
    kinds = {each.name for each in devices}
    why = f"{len(devices)} processes, each with the whole model; {' and '.join(sorted(kinds))}"
    return "ddp", Reason("strategy", "ddp", why)


def _scarcest(devices: Sequence[DeviceFacts]) -> DeviceFacts:
    """Return the device that limits the others: the one with the least free memory known."""
    return min(
        devices,
        key=lambda each: math.inf if each.memory_free_bytes is None else each.memory_free_bytes,
    )


def plan(
    backend: str,
    devices: Sequence[DeviceFacts],
    capabilities: Sequence[Capabilities],
    environment: Mapping[str, str],
    model: ModelFacts,
    data: DataFacts,
    request: TrainRequest,
) -> Plan:
    """Choose how to train `model` on `devices`, and say why.

    Args:
        backend: name of the devices' backend.
        devices: that were selected, one a rank.
        capabilities: what each can run.
        environment: variables that the backend wants in the worker.
        model: its shape.
        data: the encoded rows' sizes.
        request: what the user asked; explicit choices are kept and only checked.

    Raises:
        PlanError: an explicit choice can't be met, or nothing fits; names the nearest that does.
    """
    _check_context(model, data)
    ranks = len(devices)
    device = _scarcest(devices)
    strategy, strategy_reason = _strategy(devices, capabilities)
    compute, dtype_reason = _dtype(device, request.dtype)
    tuner, tuner_reason = _tuner(request, model)
    # Updates of full tuning are smaller than bfloat16 can add, so its weights stay float32.
    weights = "float32" if tuner == "full" else compute
    size, accumulation, batch_reasons = _batch(request, data, ranks)
    draft, fit_reasons = _fit(
        model, request, data, device, tuner, (compute, weights), (size, accumulation), ranks
    )
    global_batch = draft.batch_size * draft.accumulation * ranks
    steps = _total_steps(request, len(data.lengths), global_batch)
    label_accuracy, label_reason = _label_accuracy(request, data)
    rate = request.learning_rate or LEARNING_RATES[tuner]
    threads = request.threads or _threads(device, ranks)
    found = [
        Reason(
            "device",
            ", ".join(f"{backend}:{each.index}" for each in devices),
            f"{device.name}; --device {request.device}",
        ),
        strategy_reason,
        tuner_reason,
        dtype_reason,
        *batch_reasons,
        *fit_reasons,
        None
        if request.learning_rate
        else Reason("learning_rate", f"{rate:g}", f"the usual peak for {tuner}"),
        None
        if request.max_length
        else Reason("max_length", str(data.max_length), f"the longest row has {data.longest}"),
        label_reason,
    ]
    if device.backend == "cpu":
        found.append(Reason("threads", str(threads), "cores that this process may really use"))
    if request.threads is not None or (ranks > 1 and device.backend == "cpu"):
        environment = {**environment, "OMP_NUM_THREADS": str(threads)}
    return Plan(
        backend=backend,
        torch_devices=torch_names(devices, capabilities[0]),
        distributed_backend=capabilities[0].distributed_backend,
        strategy=strategy,
        tuner=tuner,
        compute_dtype=compute,
        weights_dtype=weights,
        attention=_attention(request, capabilities[0], compute),
        threads=threads,
        environment=dict(environment),
        max_length=data.max_length,
        per_device_train_batch_size=draft.batch_size,
        gradient_accumulation_steps=draft.accumulation,
        gradient_checkpointing=draft.checkpointing,
        learning_rate=rate,
        train_rows=len(data.lengths),
        val_rows=data.val_rows,
        steps_per_epoch=math.ceil(len(data.lengths) / global_batch),
        total_steps=steps,
        label_accuracy=label_accuracy,
        memory=draft.memory,
        reasons=tuple(each for each in found if each is not None),
        warnings=tuple(_warnings(request, data, steps, global_batch)),
    )


def _threads(device: DeviceFacts, ranks: int) -> int:
    """Return the host's threads for each rank: the CPU's cores are shared, a chip needs few."""
    if device.backend != "cpu":
        return 1
    return max(1, (device.compute_units or 1) // ranks)


def as_explicit(request: TrainRequest, plan: Plan) -> TrainRequest:
    """Return the request with the plan's choices spelt out, so that a resumed run keeps them."""
    return replace(
        request,
        tuner=plan.tuner,
        dtype=plan.compute_dtype,
        max_length=plan.max_length,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        gradient_checkpointing="on" if plan.gradient_checkpointing else "off",
        nproc_per_node=len(plan.torch_devices),
        learning_rate=plan.learning_rate,
        threads=plan.threads if "cpu" in plan.torch_devices else request.threads,
        label_accuracy="on" if plan.label_accuracy else "off",
    )
