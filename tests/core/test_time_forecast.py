"""Forecasts of time: how they move with what is asked, and published measurements."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from mst.catalogue import find
from mst.configuration import Configuration
from mst.facts import DeviceFacts
from mst.model.facts import LinearShape, ModelFacts
from mst.step_work import model_work, step_work
from mst.time_forecast import (
    ACCELERATOR,
    AMX,
    CPU,
    CPU_FLOAT32,
    Link,
    efficiency,
    link_of,
    over_steps,
    step_time,
    step_timer,
)

LAYERS_OF_QWEN = {"1.8B": (2048, 24, 5504), "7B": (4096, 32, 11008), "72B": (8192, 80, 24576)}
LORA = Configuration(lora_rank=64, micro_batch=1, accumulation=8)
FULL = replace(LORA, tuner="full")
QLORA = replace(LORA, tuner="qlora", quantization="nf4")


def qwen(size: str) -> ModelFacts:
    """Qwen 1: queries, keys and values in one product, no shared heads, an output head."""
    hidden, layers, inner = LAYERS_OF_QWEN[size]
    shapes = {
        "attn.c_attn": (3 * hidden, hidden), "attn.c_proj": (hidden, hidden),
        "mlp.w1": (inner, hidden), "mlp.w2": (inner, hidden), "mlp.c_proj": (hidden, inner),
    }  # fmt: skip
    linears = [
        LinearShape(f"transformer.h.{layer}.{name}", *shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    ]
    head = 151936 * hidden
    body = sum(each.out_features * each.in_features for each in linears)
    return ModelFacts(
        "", "qwen", body + 2 * head, 0, "BF16", layers, hidden, hidden // 128, 151936, 32768,
        tuple(linears), head_dim=128, embedding_parameters=head, head_parameters=head,
    )  # fmt: skip


def chip(name: str, links: str = "", count: int = 1) -> DeviceFacts:
    """A chip of the catalogue as its backend reports it."""
    known = find("cuda", name)
    assert known is not None
    assert known.memory_bytes is not None
    assert known.bandwidth_bytes_per_second is not None
    memory = int(known.memory_bytes.value)
    return DeviceFacts(
        "cuda", 0, name, known.arch, memory, memory, known.dtypes,
        peak_tflops={dtype: figure.value for dtype, figure in known.peak_tflops.items()},
        bandwidth_bytes_per_second=known.bandwidth_bytes_per_second.value,
        links={f"cuda:{i}": links for i in range(1, count)} if links else {},
    )  # fmt: skip


def smollm2() -> ModelFacts:
    """SmolLM2-135M: nine heads of 64, of which three share a key; its head is its embedding."""
    shapes = {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576), "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
    }  # fmt: skip
    linears = tuple(
        LinearShape(f"model.layers.{layer}.{name}", *shape)
        for layer in range(30)
        for name, shape in shapes.items()
    )
    body = sum(each.out_features * each.in_features for each in linears)
    return ModelFacts(
        "", "llama", body + 49152 * 576, 0, "BF16", 30, 576, 9, 49152, 8192, linears, head_dim=64,
        embedding_parameters=49152 * 576,
    )  # fmt: skip


SMOLLM2 = smollm2()
A100 = chip("NVIDIA A100-SXM4-80GB", "NV12", 4)
RTX_3090 = chip("NVIDIA GeForce RTX 3090")
QWEN_7B = qwen("7B")


def seconds(
    made: Configuration,
    device: DeviceFacts = A100,
    model: ModelFacts = QWEN_7B,
    length: int = 2048,
    link: Link | None = None,
) -> float:
    """Seconds of a step whose rows have `length` tokens, all of which carry loss."""
    tokens = length * made.micro_batch * made.accumulation * made.world_size
    found = step_time(model, made, tokens, tokens, length, device, link)
    assert found is not None
    return found.step_seconds


# Qwen's README, "Profiling of Memory and Speed": one A100-SXM4-80GB, batch 1, accumulation 8,
# LoRA r=64, gradient checkpointing, flash attention 2, PyTorch 2.0. Seconds an optimizer step.
PUBLISHED_LORA = {
    "1.8B": {256: 1.0, 512: 1.0, 1024: 1.1, 2048: 1.7, 4096: 3.3, 8192: 6.8},
    "7B": {256: 1.2, 512: 1.5, 1024: 2.8, 2048: 5.2, 4096: 10.1, 8192: 21.3},
}


@pytest.mark.parametrize(
    ("size", "length", "measured"),
    [(size, *point) for size, points in PUBLISHED_LORA.items() for point in points.items()],
)
def test_published_lora_steps_on_an_a100_are_within_the_uncertainty(
    size: str, length: int, measured: float
) -> None:
    made, tokens = replace(LORA, checkpointing=True), 8 * length
    found = step_time(qwen(size), made, tokens, tokens, length, A100)

    assert found is not None
    assert 1 / found.uncertainty < found.step_seconds / measured < found.uncertainty
    assert found.uncertainty <= 1.5


@pytest.mark.parametrize(("length", "measured"), [(256, 17.6), (2048, 45.7), (8192, 161.5)])
def test_published_zero3_steps_of_72b_on_four_a100s_are_within_the_uncertainty(
    length: int, measured: float
) -> None:
    made = replace(LORA, checkpointing=True, strategy="zero3", world_size=4)

    assert 1 / 1.5 < seconds(made, model=qwen("72B"), length=length) / measured < 1.5


def test_published_full_tuning_of_7b_on_eight_a100s_is_within_the_uncertainty() -> None:
    """MosaicML llm-foundry, MPT-7B under FSDP: 4,641 tokens a second and device."""
    made = replace(FULL, strategy="zero3", world_size=8, micro_batch=6, accumulation=2)

    assert 1 / 1.6 < seconds(made) / (12 * 2048 / 4641) < 1.6


def test_more_tokens_take_more_time() -> None:
    times = [seconds(LORA, length=length) for length in (64, 512, 1024, 2048, 8192)]

    assert times == sorted(times)
    assert times[-1] > 4 * times[-2]  # attention grows with the square


def test_methods_are_ordered_by_their_work() -> None:
    lora, full, qlora = (seconds(made) for made in (LORA, FULL, QLORA))

    assert lora < qlora < 2 * lora
    # Six operations a weight and token to four, and the optimizer.
    assert 1.3 * lora < full < 2 * lora


def test_checkpointing_costs_a_forward_pass() -> None:
    lora = seconds(replace(LORA, checkpointing=True)) / seconds(LORA)
    full = seconds(replace(FULL, checkpointing=True)) / seconds(FULL)

    assert 1.35 < lora < 1.55
    assert 1.2 < full < 1.4


def test_quantized_weights_are_unpacked_once_more_for_each_micro_batch() -> None:
    more, less = (
        seconds(replace(QLORA, micro_batch=rows, accumulation=8 // rows))
        - seconds(replace(LORA, micro_batch=rows, accumulation=8 // rows))
        for rows in (1, 8)
    )

    assert more > less > 0


def test_sharing_the_weights_over_a_slow_link_is_slower_than_copies_of_them() -> None:
    copies = replace(LORA, strategy="ddp", world_size=2, accumulation=4)
    shared = replace(copies, strategy="zero3")
    slow = Link(10e9, "a test", True)

    assert seconds(shared, link=slow) > 2 * seconds(copies, link=slow)
    assert seconds(shared) < 1.5 * seconds(copies)


def test_two_devices_halve_the_time_of_the_same_rows() -> None:
    two = replace(LORA, strategy="ddp", world_size=2, accumulation=4)

    assert 0.5 * seconds(LORA) <= seconds(two) < 0.55 * seconds(LORA)


def test_full_gradients_over_a_slow_link_cost_more_than_adapters() -> None:
    lora = replace(LORA, strategy="ddp", world_size=2)
    full = replace(lora, tuner="full", weights_dtype="float32")
    slow = Link(1e9, "a test", True)
    gradients = 4 * QWEN_7B.parameters / 1e9  # a ring of two sends each once

    assert seconds(full, link=slow) - seconds(full) == pytest.approx(gradients, rel=0.02)
    assert seconds(lora, link=slow) - seconds(lora) < 0.05 * gradients


def test_offloading_goes_over_the_bus_and_is_less_certain() -> None:
    made = replace(FULL, strategy="zero2", world_size=1)
    away = replace(made, offload="optimizer")
    tokens = 8 * 2048
    found = step_time(QWEN_7B, away, tokens, tokens, 2048, A100)
    streamed = seconds(replace(away, strategy="zero3", offload="parameters"))

    assert found is not None
    assert streamed > found.step_seconds > seconds(made) + 1
    assert found.uncertainty > 1.5


def test_a_3090_is_slower_than_an_a100_as_its_peaks_are() -> None:
    ratio = seconds(LORA, RTX_3090) / seconds(LORA)

    assert 936e9 < 2039e9
    assert 2039 / 936 < ratio < 312 / 71


def test_small_micro_batches_are_bound_by_starting_kernels() -> None:
    """Qwen-7B took 1.2 s a step at 256 tokens a micro-batch; a quarter of them is no quicker."""
    made = replace(LORA, checkpointing=True)

    assert seconds(made, length=64) == pytest.approx(seconds(made, length=256), rel=0.1)


def test_packed_rows_pay_for_the_width_of_their_lines() -> None:
    work = model_work(QWEN_7B, ("all-linear",))
    alone = step_work(work, replace(LORA, micro_batch=1), 2048, 1024, 256, 1.0)
    packed = step_work(work, replace(LORA, micro_batch=8), 2048, 1024, 256, 1.0)
    attention = 4 * (1 + 2.5) * 2048 * work.attention

    assert packed.attention_flop - alone.attention_flop == attention * (2 * 256 + 64 - 128)


def test_attention_in_blocks_counts_the_keys_that_blocks_meet() -> None:
    work = model_work(QWEN_7B, ("all-linear",))
    made = replace(LORA, block_attention=True)

    def span(rows: int, length: float) -> float:
        found = step_work(work, replace(made, micro_batch=rows), 4096, 1024, length, 1.0)
        return found.attention_flop / (4 * (1 + 2.5) * work.attention * 4096)

    # Blocks of 64 queries meet 64, 128 ... 1,024 keys, whether or not rows share lines.
    assert span(1, 1024) == span(2, 1024) == pytest.approx(544)
    # Each meets its own rows, and those that begin before it.
    assert 64 < span(16, 35) < 64 + 35
    # Long rows are cut into blocks of 128.
    assert span(1, 4096) == pytest.approx((4096 + 128) / 2)


def test_rows_eight_times_as_long_cost_on_a_cpu_what_was_measured() -> None:
    """SmolLM2-135M on one Zen 4 core: 0.78 to 0.82 of the tokens a second (docs/time.md)."""
    made = Configuration(block_attention=True)
    short = seconds(replace(made, micro_batch=16), ZEN4, SMOLLM2, 128)
    long = seconds(replace(made, micro_batch=2), ZEN4, SMOLLM2, 1024)
    by_torch = replace(made, block_attention=False)

    assert 0.75 < short / long < 0.85
    # torch's kernel computes what the mask hides too.
    assert seconds(replace(by_torch, micro_batch=2), ZEN4, SMOLLM2, 1024) > 1.5 * long


def test_only_the_experts_that_a_token_meets_count() -> None:
    dense = qwen("1.8B")
    experts = tuple(
        LinearShape(f"model.layers.{layer}.mlp.experts.{expert}.{name}", 1408, 2048)
        for layer in range(24)
        for expert in range(8)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    each = 24 * 3 * 1408 * 2048
    routed = replace(
        dense, linears=dense.linears + experts, experts=8, experts_per_token=2,
        expert_parameters=8 * each,
    )  # fmt: skip
    fused = replace(routed, linears=dense.linears)
    body = model_work(dense, ("all-linear",)).body

    assert model_work(routed, ("all-linear",)).body == pytest.approx(body + 2 * each)
    assert model_work(fused, ("all-linear",)).body == pytest.approx(body + 2 * each)
    assert model_work(fused, ("all-linear",)).units == pytest.approx(
        model_work(routed, ("all-linear",)).units
    )


def test_an_unknown_peak_gives_no_forecast() -> None:
    unknown = replace(A100, peak_tflops={"float32": 19.5})

    assert step_time(QWEN_7B, LORA, 1000, 500, 100, unknown) is None
    single = replace(LORA, compute_dtype="float32", weights_dtype="float32")
    assert step_time(QWEN_7B, single, 1000, 500, 100, unknown) is not None


ZEN4 = DeviceFacts(
    "cpu", 0, "a Zen 4", "x86_64", None, None, ("bfloat16", "float32"), compute_units=2,
    features=("avx2", "avx512f", "avx512_bf16"), peak_tflops={"float32": 0.3},
)  # fmt: skip


def test_a_cpu_whose_core_is_not_known_is_forecast_as_the_nearest_that_is() -> None:
    known = replace(ZEN4, peak_tflops={"float32": 0.3, "bfloat16": 0.6})
    stranger = replace(ZEN4, peak_tflops={})
    declared, nearest, guessed = (
        step_time(qwen("1.8B"), LORA, 2048, 2048, 256, each) for each in (known, ZEN4, stranger)
    )

    assert declared is not None
    assert nearest is not None
    assert guessed is not None
    assert nearest.step_seconds == pytest.approx(declared.step_seconds)
    assert declared.uncertainty == 1.5
    assert (nearest.uncertainty, guessed.uncertainty) == (3.0, 4.5)
    assert "assumed" not in declared.basis
    assert nearest.basis.endswith(
        "; peak assumed, as of other cores with avx512_bf16: 2 times float32's"
    )
    assert guessed.basis.endswith("64 operations a cycle, 3 GHz")


def test_a_cpu_that_only_emulates_a_dtype_has_no_forecast_in_it() -> None:
    old = replace(ZEN4, features=("avx2",))
    single = replace(LORA, compute_dtype="float32", weights_dtype="float32")

    assert step_time(qwen("1.8B"), LORA, 2048, 2048, 256, old) is None
    assert step_time(qwen("1.8B"), single, 2048, 2048, 256, old) is not None
    half = replace(LORA, compute_dtype="float16")
    assert step_time(qwen("1.8B"), half, 2048, 2048, 256, ZEN4) is None


def test_an_unknown_bandwidth_is_said_and_makes_it_less_certain() -> None:
    known = step_time(QWEN_7B, LORA, 16384, 16384, 2048, A100)
    guessed = step_time(
        QWEN_7B, LORA, 16384, 16384, 2048, replace(A100, bandwidth_bytes_per_second=None)
    )

    assert known is not None
    assert guessed is not None
    assert guessed.uncertainty > known.uncertainty
    assert "memory bandwidth assumed" in guessed.basis
    assert known.basis.startswith("table: ")


def test_ranks_on_a_cpu_share_its_cores() -> None:
    cpu = DeviceFacts(
        "cpu", 0, "a CPU", "x86_64", None, None, ("bfloat16",), compute_units=8,
        peak_tflops={"bfloat16": 4.0},
    )  # fmt: skip
    two = replace(LORA, strategy="ddp", world_size=2, accumulation=4)
    ratio = seconds(two, cpu, qwen("1.8B"), 256) / seconds(LORA, cpu, qwen("1.8B"), 256)

    assert 0.95 < ratio < 1.3


def test_links_are_read_from_the_drivers_words() -> None:
    two_3090s = replace(RTX_3090, links={"cuda:1": "NV4"})
    mixed = replace(A100, links={"cuda:1": "NV12", "cuda:2": "SYS"})

    assert link_of(A100).bytes_per_second == pytest.approx(0.75 * 300e9)
    assert link_of(two_3090s).bytes_per_second == pytest.approx(0.75 * 4 * 14.0625e9)
    assert link_of(A100).known
    assert link_of(two_3090s).known
    assert link_of(mixed).source == "assumed: PCIe 3.0 x16"
    assert not link_of(mixed).known
    assert link_of(A100, nnodes=2).bytes_per_second < link_of(mixed).bytes_per_second


def test_a_run_is_its_steps() -> None:
    step = step_time(QWEN_7B, LORA, 16384, 16384, 2048, A100)

    assert step is not None
    assert over_steps(step, 50).total_seconds == pytest.approx(50 * step.step_seconds)
    assert over_steps(step, 50).step_seconds == step.step_seconds


def test_a_thousand_configurations_take_less_than_a_second() -> None:
    timer = step_timer(qwen("72B"), ("all-linear",), A100)
    began = time.perf_counter()
    for _ in range(1000):
        timer(LORA, 16384, 16384, 2048)

    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("document", ["time.md", "time.zh-CN.md"])
def test_the_document_shows_the_table(document: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / document).read_text(encoding="utf-8")
    rows = [line.split("|")[1:] for line in text.splitlines() if "µs |" in line]
    shown = [
        (float(row[1]), float(row[2]), float(row[4]), float(row[5]), float(row[6]),
         float(row[7].split()[0]) * 1e-6, float(row[8].split()[1]))
        for row in rows
    ]  # fmt: skip
    known = (ACCELERATOR, CPU, CPU_FLOAT32, AMX)
    table = [
        (one.products, one.attention, one.elementwise_passes, one.bandwidth, one.unpacking,
         one.launch_seconds, one.uncertainty)
        for one in known
    ]  # fmt: skip

    assert shown == [pytest.approx(row) for row in table]
    blocks = [None if row[3].strip() == "-" else float(row[3]) for row in rows]
    assert blocks == [one.block_attention for one in known]


def test_a_cpu_is_forecast_by_its_dtype_and_its_instructions() -> None:
    plain = DeviceFacts("cpu", 0, "a CPU", "x86_64", None, None, ("bfloat16",))
    amx = replace(plain, features=("amx_bf16",))

    assert efficiency(plain, "bfloat16") == CPU
    assert efficiency(amx, "bfloat16") == AMX
    assert efficiency(amx, "float32") == CPU_FLOAT32
    assert efficiency(A100, "bfloat16") == ACCELERATOR
