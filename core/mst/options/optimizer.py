"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="optimizer")


@dataclass(frozen=True)
class OptimizerOptions:
    """The group "optimizer" of `mst.request.TrainRequest`."""

    learning_rate: float | None = _option(None, "peak learning rate", above=0)
    optim: str = _option(
        "auto",
        "AdamW with moments in float32, in 8 bits, or in 8 bits that spill to the host",
        choices=("auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
        aliases=("optimizer",),
    )
    lr_scheduler_type: str = _option(
        "cosine",
        "shape of the learning rate after warm-up",
        choices=("cosine", "linear", "constant"),
        aliases=("lr_scheduler",),
    )
    warmup_ratio: float = _option(
        0.03, "share of the steps over which it rises", at_least=0, below=1
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay", at_least=0)
    adam_beta1: float = _option(0.9, "AdamW's first beta", at_least=0, below=1)
    adam_beta2: float = _option(0.999, "AdamW's second beta", at_least=0, below=1)
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = _option(
        1.0, "gradients are scaled down to this norm; 0 for never", at_least=0
    )
