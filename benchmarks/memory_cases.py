"""What memory is measured of: small models with random weights, and ways to train them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.configuration import Configuration
from mst.memory import StepShape
from mst.training.batches import BatchShape, batch_shape, layout_of, lines_of


@dataclass(frozen=True)
class Shape:
    """A model with random weights: what its config.json says."""

    kind: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool


SHAPES = {
    "llama-5m": Shape("llama", 4096, 256, 688, 4, 4, 2, False),
    "llama-38m": Shape("llama", 8192, 512, 1408, 10, 8, 4, False),
    "qwen3-48m": Shape("qwen3", 16384, 512, 1536, 12, 8, 4, True),
    "qwen2-90m": Shape("qwen2", 32768, 640, 1728, 16, 10, 2, True),
    "smollm2-135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, True),
    "llama-280m": Shape("llama", 16384, 1024, 2816, 20, 16, 4, False),
}


@dataclass(frozen=True)
class Case:
    """One configuration of one model on one device.

    Attributes:
        device: "cpu" or "simchip".
        shape: a key of `SHAPES`.
        configuration: how it is trained.
        lengths: tokens of each row of the micro-batch.
        labels: of these, how many at the end of each row carry loss.
        packing: rows are laid end to end where `mst.training.batches` does so.
    """

    device: str
    shape: str
    configuration: Configuration
    lengths: tuple[int, ...]
    labels: int
    packing: bool

    @property
    def name(self) -> str:
        """What tells this case from all others."""
        made = self.configuration
        parts = [
            self.device, self.shape, made.tuner, f"r{made.lora_rank}", made.compute_dtype,
            made.attention, _recomputed(made),
            f"{made.accumulation}x{len(self.lengths)}x{max(self.lengths)}",
            "padded" if len(set(self.lengths)) > 1 else "even", f"{self.labels}l",
            "packed" if laid_out(self).packed else "rows",
            *(["roomy"] if made.heap == "roomy" else []),
            *(["compiled"] if made.compiled else []),
            *(["offloaded"] if made.activation_offloading else []),
        ]  # fmt: skip
        return " ".join(parts)


def _recomputed(made: Configuration) -> str:
    if not made.checkpointing:
        return "whole"
    return "checkpointing" + (f"-{made.checkpointed_layers}" if made.checkpointed_layers else "")


def _case(
    device: str,
    shape: str,
    tuner: str,
    rows: int,
    length: int,
    labels: int,
    *flags: str,
    rank: int = 8,
    accumulation: int = 1,
    recomputed: int | None = None,
) -> Case:
    """Return a case.

    Flags are "fp32", "eager", "ckpt", "padded", "packed", "roomy", "compiled", "offloaded".
    """
    compute = "float32" if "fp32" in flags else "bfloat16"
    lengths = [length - (16 * i if "padded" in flags else 0) for i in range(rows)]
    made = Configuration(
        tuner=tuner,
        quantization="nf4" if tuner == "qlora" else "none",
        compute_dtype=compute,
        weights_dtype="float32" if tuner == "full" else compute,
        lora_rank=rank,
        attention="eager" if "eager" in flags else "sdpa",
        checkpointing="ckpt" in flags or recomputed is not None,
        checkpointed_layers=recomputed,
        micro_batch=rows,
        accumulation=accumulation,
        # As the planner chooses where there is room; the others are what it falls back to.
        chunked_loss="roomy" in flags,
        heap="roomy" if "roomy" in flags else "tight",
        compiled="compiled" in flags,
        activation_offloading="offloaded" in flags,
    )
    packing = device == "cpu" or "packed" in flags
    return Case(device, shape, made, tuple(lengths), labels, packing)


def cases() -> list[Case]:
    """Return all cases."""
    both: list[tuple[Any, ...]] = [
        ("llama-5m", "lora", 4, 256, 256),
        ("llama-5m", "full", 4, 256, 64, "fp32"),
        ("llama-38m", "lora", 1, 1024, 1024),
        ("llama-38m", "lora", 4, 512, 512, "ckpt"),
        ("llama-38m", "lora", 2, 512, 64, "fp32"),
        ("llama-38m", "lora", 2, 512, 512, "eager"),
        ("llama-38m", "full", 2, 512, 512),
        ("llama-38m", "full", 2, 512, 512, "fp32", "ckpt"),
        ("llama-38m", "full", 1, 256, 32),
        ("qwen3-48m", "lora", 2, 384, 384),
        ("qwen3-48m", "lora", 6, 512, 32, "padded"),
        ("qwen3-48m", "lora", 1, 2048, 256, "ckpt"),
        ("qwen3-48m", "full", 1, 512, 512, "ckpt"),
        ("qwen2-90m", "lora", 2, 256, 256, "fp32"),
        ("qwen2-90m", "lora", 2, 512, 512, "ckpt", "eager"),
        ("qwen2-90m", "full", 1, 256, 256, "fp32"),
        ("smollm2-135m", "lora", 1, 512, 512),
        ("smollm2-135m", "lora", 1, 1024, 64, "ckpt"),
        ("smollm2-135m", "full", 1, 256, 256),
        ("llama-280m", "lora", 1, 256, 256),
        ("llama-280m", "lora", 1, 512, 512, "ckpt", "fp32"),
    ]  # fmt: skip
    # Layers run compiled where lines have padding or several rows: without either there is no mask.
    compiled: list[tuple[Any, ...]] = [
        ("llama-38m", "lora", 3, 512, 384),
        ("llama-38m", "lora", 3, 512, 64, "fp32"),
        ("llama-38m", "full", 3, 384, 256),
        ("qwen2-90m", "lora", 3, 256, 192, "fp32"),
        ("qwen3-48m", "lora", 6, 512, 32),
        ("smollm2-135m", "lora", 3, 384, 64),
        ("smollm2-135m", "lora", 3, 512, 64, "ckpt"),
        ("llama-38m", "qlora", 3, 512, 384),
        ("smollm2-135m", "qlora", 3, 384, 64),
    ]
    found = [_case(device, *each) for device in ("simchip", "cpu") for each in both]
    found += [_case("cpu", *each, "padded", "roomy", "compiled") for each in compiled]
    found += [
        _case("cpu", *each, "roomy")
        for each in both
        if each[:4] in {
            ("llama-38m", "lora", 1, 1024), ("llama-38m", "lora", 4, 512),
            ("llama-38m", "full", 2, 512), ("qwen3-48m", "lora", 6, 512),
            ("qwen2-90m", "lora", 2, 256), ("smollm2-135m", "lora", 1, 512),
            ("smollm2-135m", "lora", 1, 1024), ("smollm2-135m", "full", 1, 256),
            ("llama-280m", "lora", 1, 256),
        }
    ]  # fmt: skip
    found += [
        _case(device, "llama-38m", "lora", 2, 512, 256, rank=64) for device in ("simchip", "cpu")
    ]
    found += [
        _case("simchip", "llama-38m", "lora", 1, 256, 256, rank=256),
        _case("simchip", "llama-38m", "full", 2, 256, 256, accumulation=2),
        _case("simchip", "qwen3-48m", "lora", 2, 512, 64, "eager", "padded"),
        _case("simchip", "llama-280m", "full", 1, 128, 128),
        _case("simchip", "qwen3-48m", "lora", 4, 256, 256, "packed"),
        _case("simchip", "llama-38m", "full", 4, 384, 64, "packed", "fp32"),
    ]
    found += [
        _case("cpu", "llama-38m", "qlora", 2, 512, 512),
        _case("cpu", "qwen3-48m", "qlora", 1, 512, 64, "ckpt"),
        _case("cpu", "smollm2-135m", "qlora", 1, 512, 512, rank=16),
        _case("cpu", "llama-280m", "qlora", 1, 256, 256, "ckpt"),
    ]
    return found


def some_layers() -> list[Case]:
    """Return cases of which the first layers are recomputed, some of them or none."""
    some: list[tuple[int | None, tuple[Any, ...]]] = [
        (None, ("llama-38m", "lora", 2, 256, 256)),
        (3, ("llama-38m", "lora", 2, 256, 256)),
        (7, ("llama-38m", "lora", 2, 256, 256)),
        (5, ("llama-38m", "full", 2, 128, 128, "fp32")),
        (6, ("qwen3-48m", "full", 1, 192, 192)),
        (8, ("qwen2-90m", "lora", 1, 256, 256, "eager")),
        (None, ("smollm2-135m", "lora", 1, 256, 64)),
        (10, ("smollm2-135m", "lora", 1, 256, 64)),
        (29, ("smollm2-135m", "lora", 1, 256, 64)),
    ]
    found = [
        _case(device, *each, recomputed=count)
        for device in ("simchip", "cpu")
        for count, each in some
    ]
    found += [
        _case("cpu", *each, "roomy", recomputed=count)
        for count, each in some
        if count in (3, 7, 10)
    ]
    return found


def short_rows() -> list[Case]:
    """Return cases on a CPU all of whose tensors are small, so that its heap holds them."""
    found: list[tuple[Any, ...]] = [
        ("qwen2-90m", "lora", 1, 256, 64),
        ("llama-280m", "lora", 1, 128, 64),
        ("qwen3-48m", "lora", 2, 128, 128),
        ("smollm2-135m", "lora", 1, 128, 64),
    ]
    return [_case("cpu", *each) for each in found]


def offloaded() -> list[Case]:
    """Return cases whose recomputed layers keep what they need on the host, all or some."""
    found: list[tuple[int | None, tuple[Any, ...]]] = [
        (None, ("llama-38m", "lora", 1, 384, 64)),
        (7, ("llama-38m", "lora", 1, 384, 64)),
        (None, ("llama-38m", "full", 1, 128, 64, "fp32")),
        (None, ("qwen3-48m", "lora", 1, 256, 64)),
    ]
    return [_case("simchip", *each, "ckpt", "offloaded", recomputed=count) for count, each in found]


def laid_out(case: Case) -> BatchShape:
    """Return the tensors of the case's micro-batch."""
    made = case.configuration
    layout = layout_of(case.packing, made.attention, made.compiled)
    lines = lines_of(case.lengths, layout)
    return batch_shape([[case.lengths[row] for row in line] for line in lines], layout)


def step_shape(case: Case) -> StepShape:
    """Return the case's micro-batch as the planner would describe it."""
    lengths = case.lengths
    made = laid_out(case)
    packed = made.packed
    # A label at position i is predicted from i - 1, and a row's first token by nothing.
    kept = {n - 2 - i for n in lengths for i in range(min(case.labels, n - 1))}
    total = sum(min(case.labels, n - 1) for n in lengths)
    return StepShape(
        tokens=made.lines * made.width,
        label_tokens=total,
        mask_values=made.lines * made.width**2 if packed else 0,
        rows=made.lines,
        width=made.width,
        kept=total if packed else len(kept),
        masked=made.masked,
        alike=True,
    )


def write_model(shape: Shape, directory: Path) -> None:
    """Write a model of this shape with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**vars(shape), "max_position_embeddings": 4096}
    kind = values.pop("kind")
    if kind == "qwen3":
        values["head_dim"] = shape.hidden_size // shape.num_attention_heads
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    untyped: Any = AutoModelForCausalLM
    untyped.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
