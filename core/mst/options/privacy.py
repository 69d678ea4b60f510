"""Differential privacy of what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="privacy")


@dataclass(frozen=True)
class PrivacyOptions:
    """The group "privacy" of `mst.request.TrainRequest`."""

    dp_epsilon: float | None = _option(
        None,
        "experimental: differential privacy of the tuned weights with this ε, of LoRA alone",
        above=0,
    )
    dp_delta: float | None = _option(
        None, "chance that ε does not hold; default a tenth of 1 / units", above=0, below=1
    )
    dp_unit: str | None = _option(
        None,
        "what is protected: all rows with the same value in this column (patient_id); default each"
        " row",
        metavar="COLUMN",
    )
