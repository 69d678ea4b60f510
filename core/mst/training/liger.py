"""Liger's kernels in the place of a decoder's norms, rotary positions and gated layers."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from typing import TYPE_CHECKING, Any

from mst.errors import MstError
from mst.training.adapters import under_adapters
from mst.training.batches import Layout
from mst.training.compilation import kernel_cache
from mst.training.faults import is_out_of_memory
from mst.training.layer_gradients import difference, in_a_line, last_gradients, made_up_row
from mst.training.loss import Logits
from mst.training.scoring import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

# The loss stays mst's own: it makes logits of labels alone, and every objective is made of it.
_NOT_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
# Tokens of made-up rows.
_LENGTHS = (80, 40)


def fuse_layers(
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout,
    how: Logits,
    scores: bool,
    cache: Path,
) -> str:
    """Put Liger's kernels into a model, or leave it as it is and return why.

    Gradients of a pass over made-up tokens are compared with those of the plain layers.

    Args:
        model: ready to be trained.
        device: where it is.
        dtype: of the matrix products.
        layout: of the micro-batches.
        how: logits are had.
        scores: the model gives scores instead.
        cache: root of mst's caches, where Triton keeps what it compiles.

    Source: Hsu et al. 2024, "Liger Kernel"; what `_apply_liger_kernel_to_instance` of the library
    does, which says in its log alone that a model is none of those it knows.
    """
    inner = under_adapters(model)
    try:
        os.environ["TRITON_CACHE_DIR"] = str(kernel_cache(cache) / "triton")
        apply = _application(inner.config.model_type)
    except (ImportError, OSError, MstError) as error:
        return str(error)
    if apply is None:
        return f"liger-kernel has none for {inner.config.model_type}"
    vocabulary = inner.get_input_embeddings().num_embeddings
    rows = [made_up_row(number, length, vocabulary) for number, length in enumerate(_LENGTHS)]
    laid = lay_out(rows, 0, layout).to(device)
    gradients = functools.partial(last_gradients, model, laid, device, dtype, how, scores)
    right = gradients()
    restore = _snapshot(inner)
    try:
        apply(inner)
        reason = difference(right, gradients(), dtype)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = in_a_line(error)
    if reason:
        restore()
    return reason


def _application(model_type: str) -> Callable[..., None] | None:
    """Return what puts Liger's kernels into a model of this type, or None."""
    # It warns of every device's kernels that are not here.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    known: Mapping[str, Callable[..., None]]
    known = importlib.import_module("liger_kernel.transformers.monkey_patch").__dict__[
        "MODEL_TYPE_TO_APPLY_LIGER_FN"
    ]
    function = known.get(model_type)
    if function is None:
        return None
    takes = inspect.signature(function).parameters
    unwanted = {name: value for name, value in _NOT_OURS.items() if name in takes}
    return lambda model: function(model=model, **unwanted)


def _snapshot(model: torch.nn.Module) -> Callable[[], None]:
    """Return what takes back all that Liger changes: attributes, methods, transformers' names."""
    code: dict[str, Any] = vars(importlib.import_module(type(model).__module__))
    before = [(code, dict(code))]
    before += [(vars(each), dict(vars(each))) for each in model.modules()]

    def restore() -> None:
        for now, then in before:
            now.clear()
            now.update(then)

    return restore
