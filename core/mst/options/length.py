"""How long a run is, and how many rows a step sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="length")


@dataclass(frozen=True)
class LengthOptions:
    """The group "length" of `mst.request.TrainRequest`."""

    max_steps: int | None = _option(None, "stop after so many optimizer steps", at_least=1)
    num_train_epochs: float = _option(
        3.0, "passes over the training rows", aliases=("num_epochs", "epochs"), above=0
    )
    per_device_train_batch_size: int | None = _option(
        None,
        "rows a micro-batch on one device",
        aliases=("micro_batch_size", "batch_size"),
        at_least=1,
    )
    gradient_accumulation_steps: int | None = _option(
        None, "micro-batches an optimizer step", at_least=1
    )
