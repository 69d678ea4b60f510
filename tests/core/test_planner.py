"""The planner over machines that exist and some that we don't own."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mst import serial
from mst.errors import PlanError
from mst.explicit import as_explicit
from mst.facts import Capabilities, DeviceFacts
from mst.model.facts import LinearShape, ModelFacts
from mst.plan import Plan
from mst.planner import plan
from mst.request import TrainRequest
from mst.training.prefixes import beginnings
from mst.workload import DataFacts, largest_step, packed, spared_share

GIB = 2**30
CPU = Capabilities("cpu", "gloo", attention=("sdpa", "eager"))
CUDA = Capabilities("cuda", "nccl", attention=("sdpa", "eager"))


def device(name: str, backend: str, gib: float, dtypes: tuple[str, ...]) -> DeviceFacts:
    return DeviceFacts(backend, 0, name, "", int(gib * GIB), int(gib * GIB), dtypes, 2)


ZEN5 = device("AMD EPYC", "cpu", 22, ("bfloat16", "float32"))
OLD_XEON = device("Xeon E5", "cpu", 64, ("float32",))
SMALL = device("a small container", "cpu", 1.0, ("float32",))
RTX_3090 = device("NVIDIA GeForce RTX 3090", "cuda", 24, ("bfloat16", "float16", "float32"))


def llama(layers: int, hidden: int, inner: int, vocab: int) -> ModelFacts:
    linears = tuple(
        LinearShape(f"model.layers.{i}.{name}", out, into)
        for i in range(layers)
        for name, out, into in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, hidden),
            ("self_attn.v_proj", hidden, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ]
    )
    count = sum(each.out_features * each.in_features for each in linears) + vocab * hidden
    return ModelFacts(
        "model", "llama", count, count * 2, "BF16", layers, hidden, 8, vocab, 4096, linears
    )


SMOLLM2 = llama(30, 576, 1536, 49152)
LLAMA_7B = llama(32, 4096, 11008, 32000)
SHORT = DataFacts((40,) * 1000, (5,) * 1000, 50, 12, 60, 60, 0)
LONG = DataFacts((2048,) * 100, (500,) * 100, 0, None, 2048, 2048, 0)


def planned(
    where: DeviceFacts, model: ModelFacts, data: DataFacts, request: TrainRequest | None = None
) -> Plan:
    capabilities = CPU if where.backend == "cpu" else CUDA
    asked = request or TrainRequest()
    return plan(where.backend, (where,), (capabilities,), {}, model, data, asked)


@pytest.mark.parametrize(("where", "dtype"), [(ZEN5, "bfloat16"), (OLD_XEON, "float32")])
def test_the_dtype_is_the_fastest_of_the_device(where: DeviceFacts, dtype: str) -> None:
    found = planned(where, SMOLLM2, SHORT)

    assert found.compute_dtype == dtype
    assert any(each.choice == "dtype" and where.name in each.why for each in found.reasons)


def test_short_rows_share_a_micro_batch_and_long_ones_do_not() -> None:
    assert planned(ZEN5, SMOLLM2, SHORT).per_device_train_batch_size == 16
    found = planned(ZEN5, SMOLLM2, LONG)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (1, 16)


def test_steps_follow_from_rows_and_epochs() -> None:
    found = planned(ZEN5, SMOLLM2, SHORT, TrainRequest(num_train_epochs=2.5))

    assert (found.steps_per_epoch, found.total_steps) == (63, 158)
    assert planned(ZEN5, SMOLLM2, SHORT, TrainRequest(max_steps=7)).total_steps == 7


def test_a_7b_model_gets_lora_on_a_3090_with_checkpointing_only_when_needed() -> None:
    short, long = planned(RTX_3090, LLAMA_7B, SHORT), planned(RTX_3090, LLAMA_7B, LONG)

    assert short.torch_devices == ("cuda:0",)
    assert (short.tuner, short.gradient_checkpointing) == ("lora", False)
    assert long.gradient_checkpointing
    assert long.memory.peak_bytes <= 0.9 * 24 * GIB


def test_full_tuning_of_7b_on_a_3090_is_refused_with_figures() -> None:
    with pytest.raises(PlanError, match=r"full tuning .* needs \d+\.\d+ GiB .*--tuner lora"):
        planned(RTX_3090, LLAMA_7B, SHORT, TrainRequest(tuner="full"))


def test_the_micro_batch_shrinks_to_fit_unless_it_was_asked_for() -> None:
    wide = DataFacts((40,) * 512, (30,) * 512, 0, None, 40, 40, 0)
    request = TrainRequest(gradient_checkpointing="off")
    roomy = planned(OLD_XEON, SMOLLM2, wide, request)
    less = replace(OLD_XEON, memory_free_bytes=int(roomy.memory.peak_bytes / 0.9 * 0.95))
    thrifty = planned(less, SMOLLM2, wide, request)
    free = int(thrifty.memory.peak_bytes / 0.9 * 0.95)
    tight = replace(OLD_XEON, memory_free_bytes=free)
    found = planned(tight, SMOLLM2, wide, request)

    assert roomy.per_device_train_batch_size == thrifty.per_device_train_batch_size == 16
    assert (roomy.heap, thrifty.heap) == ("roomy", "tight")
    assert roomy.environment["MALLOC_MMAP_THRESHOLD_"] == str(2**25)
    assert int(roomy.environment["MALLOC_TRIM_THRESHOLD_"]) > 2**39  # never
    assert thrifty.environment["MALLOC_MMAP_THRESHOLD_"] == str(2**20)
    assert thrifty.environment["MALLOC_TRIM_THRESHOLD_"] == str(2**20)
    assert found.per_device_train_batch_size < 16
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 16
    with pytest.raises(PlanError, match="micro-batch 16"):
        planned(tight, SMOLLM2, wide, replace(request, per_device_train_batch_size=16))


def test_a_plan_that_cannot_fit_names_what_it_needs() -> None:
    with pytest.raises(PlanError, match=r"has 1\.00 GiB free, of which 90%.*needs .* short"):
        planned(SMALL, SMOLLM2, LONG)


def test_an_explicit_dtype_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(PlanError, match="--dtype bfloat16 was asked for; Xeon E5 trains in float"):
        planned(OLD_XEON, SMOLLM2, SHORT, TrainRequest(dtype="bfloat16"))


def test_label_accuracy_is_for_few_answers() -> None:
    assert planned(ZEN5, SMOLLM2, SHORT).label_accuracy
    assert not planned(ZEN5, SMOLLM2, LONG).label_accuracy
    with pytest.raises(PlanError, match="--label-accuracy on"):
        planned(ZEN5, SMOLLM2, LONG, TrainRequest(label_accuracy="on"))


def test_more_context_than_the_model_has_is_refused() -> None:
    with pytest.raises(PlanError, match="--max-length 4096 or less"):
        planned(ZEN5, SMOLLM2, replace(LONG, max_length=5000))


def test_a_plan_survives_json_and_reads_the_same_twice() -> None:
    found = planned(ZEN5, SMOLLM2, SHORT)

    assert serial.from_json(Plan, serial.to_json(found)) == found
    assert planned(ZEN5, SMOLLM2, SHORT) == found


def test_a_plan_spelt_out_is_the_same_plan() -> None:
    found = planned(ZEN5, SMOLLM2, SHORT)
    again = planned(ZEN5, SMOLLM2, SHORT, as_explicit(TrainRequest(), found))

    open_parts: dict[str, object] = {"reasons": (), "environment": {}, "alternatives": ()}
    assert replace(again, **open_parts) == replace(found, **open_parts)  # type: ignore[arg-type]


def test_the_largest_micro_batch_is_the_one_that_will_be_met() -> None:
    lengths = (10, 20, 30, 40)
    data = DataFacts(lengths, (1, 2, 3, 4), 0, None, 40, 40, 0)

    assert largest_step(data, 4, 4, 0, 9).tokens == 128  # 100, rounded up to 64s
    assert largest_step(data, 1, 4, 0, 9).tokens == 48
    assert largest_step(data, 1, 4, 0, 9).label_tokens == 4


def test_rows_left_out_are_said() -> None:
    found = planned(ZEN5, SMOLLM2, replace(SHORT, deleted=3, longest=900))

    assert any("3 rows are longer than 60 tokens" in each for each in found.warnings)


def test_flash_attention_is_left_to_16_bits() -> None:
    flash = Capabilities("cuda", "nccl", attention=("flash_attention_2", "sdpa"))

    def attention(dtype: str, asked: str = "auto") -> str:
        request = TrainRequest(dtype=dtype, attn_implementation=asked)
        made = plan("cuda", (RTX_3090,), (flash,), {}, SMOLLM2, SHORT, request)
        return made.attention

    assert attention("bfloat16") == "flash_attention_2"
    assert attention("float32") == "sdpa"
    assert attention("bfloat16", "sdpa") == "sdpa"
    with pytest.raises(PlanError, match="in float32 this device offers sdpa"):
        attention("float32", "flash_attention_2")


def test_a_v100_trains_in_float16() -> None:
    v100 = device("Tesla V100-SXM2-16GB", "cuda", 16, ("float16", "float32"))
    found = planned(v100, SMOLLM2, SHORT)

    assert (found.compute_dtype, found.weights_dtype) == ("float16", "float16")
    with pytest.raises(PlanError, match="bfloat16 was asked for; Tesla V100"):
        planned(v100, SMOLLM2, SHORT, TrainRequest(dtype="bfloat16"))


def test_several_devices_share_the_global_batch() -> None:
    able = Capabilities("cuda", "nccl", ("single", "ddp"), visible_devices_env="X")
    cards = tuple(replace(RTX_3090, index=index) for index in (2, 3))
    found = plan("cuda", cards, (able, able), {}, LLAMA_7B, LONG, TrainRequest())

    assert found.strategy == "ddp"
    assert found.torch_devices == ("cuda:0", "cuda:1")
    assert found.global_batch == 16
    assert found.steps_per_epoch == 7


def test_devices_without_collectives_are_refused_together() -> None:
    request = TrainRequest(nproc_per_node=2)
    with pytest.raises(PlanError, match="--nproc-per-node 2 was asked for; NVIDIA GeForce"):
        plan("cuda", (RTX_3090,) * 2, (CUDA,) * 2, {}, SMOLLM2, SHORT, request)


def test_processes_on_the_cpu_share_its_memory_and_its_cores() -> None:
    able = Capabilities("cpu", "gloo", ("single", "ddp"))
    request = TrainRequest(nproc_per_node=2)
    found = plan("cpu", (ZEN5, ZEN5), (able, able), {}, SMOLLM2, SHORT, request)

    assert found.memory.available_bytes == 11 * GIB
    assert (found.threads, found.environment["OMP_NUM_THREADS"]) == (1, "1")


def test_blocks_take_the_place_of_rows_in_the_plan() -> None:
    data = packed(DataFacts((40, 50, 60) * 400, (5, 6, 7) * 400, 0, None, 60, 60, 0), 512)
    found = planned(ZEN5, SMOLLM2, data, TrainRequest(packing=True, num_train_epochs=1.0))

    assert len(data.lengths) == 124  # 118 would be full to the last token
    assert sum(data.label_tokens) == 7200
    assert found.train_rows == 1200
    assert found.max_length == 512
    # Sixteen rows a step without --packing are some two blocks of ten.
    assert found.global_batch == 2
    assert found.total_steps == len(data.lengths) // 2
    assert any(each.choice == "packing" and "1200 rows fill" in each.why for each in found.reasons)


def test_the_largest_micro_batch_of_blocks_has_lines_of_their_length() -> None:
    data = packed(DataFacts((40, 50, 60) * 400, (5, 6, 7) * 400, 0, None, 60, 60, 0), 512)
    step = largest_step(data, 3, 6, 0, 9)

    assert (step.rows, step.width, step.tokens) == (3, 512, 3 * 512)
    assert step.mask_values == 3 * 512**2
    assert largest_step(data, 3, 6, 0, 9, "line").width == 3 * 512


def test_many_rows_are_planned_in_lines_as_wide_as_the_longest() -> None:
    data = DataFacts((2000, *(100,) * 15), (10,) * 16, 0, None, 2000, 2000, 0)
    lines = largest_step(data, 16, 16, 0, 1, "lines")
    padded = largest_step(data, 16, 16, 0, 1, "padded")

    assert (lines.rows, lines.width) == (2, 2048)
    assert (padded.rows, padded.width) == (16, 2000)


def alike(prompt: int, lengths: Sequence[int], **more: Any) -> DataFacts:
    """Return rows of these lengths after a prompt that all of them have."""
    start = array("i", range(prompt))
    rows = [start + array("i", [10_000 + n] * length) for n, length in enumerate(lengths)]
    sizes = tuple(map(len, rows))
    facts = DataFacts(sizes, (5,) * len(rows), 0, None, max(sizes), max(sizes), 0)
    return replace(facts, beginnings=beginnings(rows), **more)


def why_shared(found: Plan) -> str:
    return next((one.why for one in found.reasons if one.choice == "prefix_sharing"), "")


def test_what_rows_begin_with_alike_is_counted_once() -> None:
    data = alike(60, (40, 50, 60, 70) * 64)
    found = planned(AMX, SMOLLM2, data)
    plain = planned(AMX, SMOLLM2, data, TrainRequest(prefix_sharing="off"))
    size = found.per_device_train_batch_size
    sizes = size, found.global_batch, 42
    shared = largest_step(data, *sizes, 9, shares=True)

    assert size > 1
    assert found.prefix_sharing
    assert not plain.prefix_sharing
    assert why_shared(found).startswith(f"{spared_share(data, *sizes):.0%} of a step's tokens")
    assert why_shared(plain) == ""
    assert found.memory.activations_bytes < plain.memory.activations_bytes
    assert found.time is not None
    assert plain.time is not None
    assert found.time.step_seconds < 0.8 * plain.time.step_seconds
    # The longest rows of a micro-batch, and the prompt before them once.
    assert shared.tokens < largest_step(data, *sizes, 9).tokens
    assert as_explicit(TrainRequest(), found).prefix_sharing == "auto"
    assert as_explicit(TrainRequest(), plain).prefix_sharing == "off"


def test_the_share_that_is_spared_is_that_of_micro_batches() -> None:
    data = alike(60, (40,) * 64)

    assert spared_share(data, 1, 16, 42) == 0
    assert spared_share(data, 4, 16, 42) == pytest.approx(3 * 60 / 400)
    assert spared_share(replace(data, beginnings=None), 4, 16, 42) == 0
    # Both conversations of a preference begin with the prompt.
    pairs = replace(data, parts=((100, 100),) * 32, lengths=(200,) * 32, label_tokens=(5,) * 32)
    assert spared_share(pairs, 2, 16, 42) == pytest.approx(3 * 60 / 400)


@pytest.mark.parametrize(
    ("request_", "model", "more", "says"),
    [
        (TrainRequest(lora_dropout=0.1, tuner="lora"), SMOLLM2, {}, "--lora-dropout would be"),
        (TrainRequest(attn_implementation="eager"), SMOLLM2, {}, "eager attention takes no mask"),
        (TrainRequest(), replace(SMOLLM2, window=64), {}, "some layers see 64 tokens back"),
        (TrainRequest(per_device_train_batch_size=1), SMOLLM2, {}, "no rows that meet"),
        (TrainRequest(packing=True), SMOLLM2, {"packed_rows": 64}, "--packing fills blocks"),
        (TrainRequest(), SMOLLM2, {"images": 64}, "the rows are padded"),
    ],
)
def test_a_plan_says_why_beginnings_are_not_shared(
    request_: TrainRequest, model: ModelFacts, more: dict[str, Any], says: str
) -> None:
    found = planned(ZEN5, model, alike(60, (40,) * 64, **more), request_)

    assert not found.prefix_sharing
    assert says in why_shared(found)


def test_rows_that_begin_in_their_own_ways_are_told_so() -> None:
    found = planned(ZEN5, SMOLLM2, alike(0, (40,) * 64))

    assert not found.prefix_sharing
    assert why_shared(found).startswith("no two rows begin with the same")


def test_forecasts_count_on_sharing_where_it_was_verified() -> None:
    data = alike(60, (40,) * 64)
    falcon = replace(SMOLLM2, model_type="falcon")
    found = planned(ZEN5, falcon, data)
    plain = planned(ZEN5, falcon, data, TrainRequest(prefix_sharing="off"))

    assert found.prefix_sharing
    assert "not verified for falcon" in why_shared(found)
    assert found.memory == plain.memory


def test_plans_of_before_share_nothing() -> None:
    stored = serial.to_json(planned(ZEN5, SMOLLM2, alike(60, (40,) * 64)))
    assert stored.pop("prefix_sharing") is True

    assert not serial.from_json(Plan, stored).prefix_sharing


COMPILING = replace(CPU, compiler="g++")
# As an Intel Xeon with AMX declares it.
AMX = replace(ZEN5, name="a Xeon", peak_tflops={"bfloat16": 7.0}, features=("amx_bf16",))


def with_compiler(
    request: TrainRequest, able: Capabilities = COMPILING, model: ModelFacts = SMOLLM2
) -> Plan:
    return plan("cpu", (AMX,), (able,), {}, model, SHORT, request)


def test_layers_are_compiled_where_that_saves_more_than_it_costs() -> None:
    short, long = (with_compiler(TrainRequest(max_steps=steps)) for steps in (20, 5000))
    plain = with_compiler(TrainRequest(max_steps=5000, torch_compile="off"))
    why = {each.choice: each for each in long.reasons}["torch_compile"]

    assert (short.compiled, long.compiled, plain.compiled) == (False, True, False)
    assert why.value == "on"
    assert why.why.startswith("it takes 35 s once, and would save ")
    assert long.time is not None
    assert plain.time is not None
    assert long.time.step_seconds < plain.time.step_seconds
    assert 5000 * long.time.step_seconds < long.time.total_seconds < plain.time.total_seconds
    assert as_explicit(TrainRequest(), long).torch_compile == "on"
    assert as_explicit(TrainRequest(), plain).torch_compile == "off"


def test_compiled_layers_leave_fewer_holes_in_the_heap() -> None:
    compiled, plain = (
        with_compiler(TrainRequest(max_steps=5000, torch_compile=choice)).memory
        for choice in ("on", "off")
    )

    assert replace(compiled, slack_bytes=0) == replace(plain, slack_bytes=0)
    assert compiled.slack_bytes < plain.slack_bytes / 2


def test_a_core_of_unknown_speed_compiles_where_the_worst_that_is_known_is_worth_it() -> None:
    # As Zen 4: instructions for bfloat16, and a peak in float32 alone.
    zen4 = replace(
        ZEN5, peak_tflops={"float32": 0.3}, features=("avx2", "avx512f", "avx512_bf16"),
        compute_units=2,
    )  # fmt: skip
    runs = [
        plan("cpu", (zen4,), (COMPILING,), {}, SMOLLM2, SHORT, TrainRequest(max_steps=steps))
        for steps in (20, 5000)
    ]
    why = next(one.why for one in runs[1].reasons if one.choice == "torch_compile")

    assert [each.compiled for each in runs] == [False, True]
    assert why.endswith("within a factor of 3")
    assert runs[1].time is not None
    assert "peak assumed, as of other cores with avx512_bf16" in runs[1].time.basis


def test_nf4_layers_are_compiled_and_int8_ones_are_not() -> None:
    able = replace(COMPILING, quantization=("none", "nf4", "int8"))
    asked = TrainRequest(tuner="qlora", max_steps=5000)
    nf4, int8 = (with_compiler(replace(asked, quant_bits=bits), able) for bits in (4, 8))
    why = next(one.why for one in int8.reasons if one.choice == "torch_compile")

    assert (nf4.quantization, nf4.compiled) == ("nf4", True)
    assert (int8.quantization, int8.compiled) == ("int8", False)
    assert "without weights in 8 bits" in why


@pytest.mark.parametrize(
    ("able", "model", "says"),
    [
        (CPU, SMOLLM2, "torch finds no compiler for this device here"),
        (COMPILING, replace(SMOLLM2, model_type="falcon"), "torch compiles wrong gradients"),
    ],
)
def test_layers_that_cannot_be_compiled_are_told_of_when_asked_for(
    able: Capabilities, model: ModelFacts, says: str
) -> None:
    with pytest.raises(PlanError, match=f"--torch-compile on was asked for: {says}"):
        with_compiler(TrainRequest(torch_compile="on"), able, model)
    found = with_compiler(TrainRequest(max_steps=5000), able, model)

    assert not found.compiled
    assert any(each.choice == "torch_compile" and says in each.why for each in found.reasons)
