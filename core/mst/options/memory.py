"""Precision, memory, and how the job is cut over devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="memory")


@dataclass(frozen=True)
class MemoryOptions:
    """The group "memory" of `mst.request.TrainRequest`."""

    memory_budget: str | None = _option(
        None,
        "memory of each device that the plan may take at the most, such as 20GB or 20GiB; on a CPU,"
        " of the machine",
        metavar="SIZE",
    )
    dtype: str = _option(
        "auto",
        "dtype of the matrix products",
        choices=("auto", "bfloat16", "float16", "float32"),
        aliases=("torch_dtype",),
    )
    gradient_checkpointing: str = _option(
        "auto",
        "recompute activations to save memory: of all layers, or of the first so many; auto: of as"
        " few as will fit",
        choices=("auto", "on", "off"),
        or_count=True,
        metavar="auto|on|off|N",
    )
    activation_offloading: str = _option(
        "auto",
        "keep what recomputed layers need in the host's memory, on accelerators; auto: where"
        " nothing fits without it",
        choices=("auto", "on", "off"),
    )
    torch_compile: str = _option(
        "auto",
        "compile the decoder's layers; auto: where that costs less time than it saves",
        choices=("auto", "on", "off"),
    )
    use_liger_kernel: str = _option(
        "auto",
        "Liger's kernels for norms, rotary positions and gated layers, on NVIDIA cards; auto: where"
        " liger-kernel is installed and the layers are not compiled",
        choices=("auto", "on", "off"),
    )
    chunked_cross_entropy: str = _option(
        "auto",
        "logits of a few hundred labels at a time, wherever the model's own are known to be those",
        choices=("auto", "off"),
    )
    prefix_sharing: str = _option(
        "auto",
        "what rows of a micro-batch begin with alike is computed once, wherever the model computes"
        " the same then",
        choices=("auto", "off"),
    )
    padding_free: str = _option(
        "auto",
        "rows lie end to end in the lines of a micro-batch, of models that keep them apart; off:"
        " each is padded to the longest",
        choices=("auto", "off"),
    )
    block_attention: str = _option(
        "auto",
        "on a CPU, attention as products of blocks of positions, instead of torch's own kernel",
        choices=("auto", "off"),
    )
    fused_adamw: str = _option(
        "auto",
        "on a CPU, AdamW's update of a weight in one kernel of torch",
        choices=("auto", "off"),
    )
    attn_implementation: str = _option(
        "auto",
        "attention of transformers: auto, or one that the backend offers",
        aliases=("attn_impl", "flash_attn"),
        metavar="NAME",
    )
    deepspeed: str = _option(
        "auto",
        "how ZeRO cuts the job over devices: auto, off, zero1, zero2, zero3, zero2_offload,"
        " zero3_offload, or a DeepSpeed JSON file",
        metavar="STAGE|FILE",
    )
    offload_dir: str | None = _option(
        None,
        "directory on a local disk for what ZeRO-3 offloads, instead of the host's memory",
        metavar="DIR",
    )
    on_oom: str = _option(
        "retry",
        "out of memory: once more from the last checkpoint with the next smaller plan, halve the"
        " micro-batch and go on from the step, or stop and say what to lower",
        choices=("retry", "shrink", "stop"),
    )
    threads: int | None = _option(None, "CPU threads of the worker", at_least=1)
