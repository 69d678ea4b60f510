"""A step of a single answer on a CPU, whose time is that of reading the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reads_half(model: torch.nn.Module, device: torch.device) -> bool:
    """Return whether `one_row` is for a model: its weights are in 16 bits, on a CPU."""
    import torch

    halves = (torch.bfloat16, torch.float16)
    return device.type == "cpu" and next(model.parameters()).dtype in halves


@contextlib.contextmanager
def one_row(wanted: bool) -> Iterator[None]:
    """Compute a pass of one token without oneDNN, where that is wanted.

    oneDNN lays a weight of 16 bits out anew in each product, which takes longer than a product with
    one row does. torch's own kernel reads the weight once, and adds in float32 as well. A step of
    SmolLM2-135M took 27 ms instead of 39 (medians of alternating steps on two cores of an AMD EPYC,
    Zen 4, not quite quiet, torch 2.13.0); from two rows on oneDNN is as fast.
    """
    import torch

    if not wanted or not torch._C._get_mkldnn_enabled():
        yield
        return
    # Not torch.backends.mkldnn.flags, which sets what oneDNN does for float32 too, and warns.
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)
