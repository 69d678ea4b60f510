"""Which weights are trained: adapters, on plain or quantized weights, or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="method")


@dataclass(frozen=True)
class MethodOptions:
    """The group "method" of `mst.request.TrainRequest`."""

    tuner: str = _option(
        "auto",
        "what is trained",
        choices=("auto", "lora", "qlora", "full"),
        aliases=("tuner_type", "train_type", "sft_type", "finetuning_type"),
    )
    quant_bits: int | None = _option(
        None,
        "bits of the frozen weights under adapters: 4 (NF4) or 8; default 4 with qlora",
        choices=("4", "8"),
        aliases=("quantization_bit",),
    )
    lora_rank: int = _option(8, "inner dimension r of LoRA", aliases=("lora_r",), at_least=1)
    lora_alpha: float = _option(
        16.0, "LoRA's scale is alpha / r (alpha / sqrt(r) with rsLoRA)", above=0
    )
    lora_dropout: float = _option(0.0, "dropout before LoRA's first matrix", at_least=0, below=1)
    target_modules: tuple[str, ...] = _option(
        ("all-linear",),
        "layers that get an adapter: names, or all-linear",
        aliases=("lora_target", "lora_target_modules"),
        metavar="NAME",
    )
    use_rslora: bool = _option(False, "rank-stabilised LoRA")
    use_dora: bool = _option(False, "weight-decomposed LoRA")
    init_lora_weights: str = _option(
        "auto",
        "adapters begin as ever, or with what quantization has lost (qera); auto: qera on 4 bits",
        choices=("auto", "default", "qera"),
        aliases=("init_weights",),
    )
