"""What the worker changes in gptqmodel 7.6.0's GPTQ, so that it takes a fraction of the time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mst_plugins.gptq_columns import rounded_columns

if TYPE_CHECKING:
    import torch

# Columns of blocks that a Hessian is summed in: with four, ten products of sixteen are made.
_BLOCKS = 4


def quicken_gptq() -> None:
    """Change the gptqmodel of this process."""
    _round_by_group()
    _sum_a_pass_at_once()
    _sum_one_half()
    _multiply_once()


def _round_by_group() -> None:
    """Let GPTQ round with `rounded_columns`, one layer after the other.

    gptqmodel rounds one on each of its workers, whose short passes contend for the interpreter.
    """
    from gptqmodel.quantization.gptq import GPTQ

    task: Any = GPTQ
    theirs = task.quantize
    alone = threading.Lock()

    def quantize(self: Any, blocksize: int = 128) -> tuple[Any, ...]:
        with alone:
            found = _quantized(self) if _is_usual(self) else None
        return found or theirs(self, blocksize)

    task.quantize = quantize


def _is_usual(task: Any) -> bool:
    """Whether a layer is rounded with the inputs' Hessian, in whole symmetric groups, in place."""
    import torch
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.utils.fallback import should_use_fallback

    config = task.qcfg
    return (
        type(task) is GPTQ
        and isinstance(task.module, torch.nn.Linear)
        and config.sym
        # Scales are searched by squared error.
        and config.mse == 2.0
        and config.group_size > 0
        and task.columns % config.group_size == 0
        and not (config.desc_act or config.static_groups or config.mock_quantization)
        and not task._tp_pad_cols
        and not should_use_fallback(task.fallback, float(task.nsamples), task.expected_nsamples)
    )


def _quantized(task: Any) -> tuple[Any, ...] | None:
    """Return what `GPTQ.quantize` returns; None where its Hessian can't be inverted."""
    import torch
    from gptqmodel.quantization import gar

    began, config, size = time.time(), task.qcfg, task.qcfg.group_size
    with torch.inference_mode():
        hessian = task.finalize_hessian(target_device=getattr(task.module, "target_device", None))
        task._release_deferred_hessian_sources()
        weight = task.clone_module(device=hessian.device)
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        groups = torch.arange(task.columns // size)
        order = torch.arange(task.columns)
        if config.act_group_aware:
            within, most = gar.compute_local_perms(hessian.diagonal(), size, return_values=True)
            groups = gar.compute_global_perm(hessian.diagonal(), size, precomputed_values=most)
            order = gar.compose_final_perm(within, groups, size)
        factor, damp = task._shared_factor_or_local(
            "act_group_aware" if config.act_group_aware else "natural",
            lambda: task.hessian_inverse(hessian[order][:, order]),
        )
        if factor is None:
            return None
        ordered, scales, lost = rounded_columns(weight[:, order], factor, size, config.bits)
        if not math.isfinite(lost):
            return None
        task.H = None
        rounded = torch.empty_like(ordered)
        rounded[:, order] = ordered
        scale = torch.empty_like(scales)
        scale[:, groups] = scales
        module, device = task.module.weight, task.module.weight.device
        return (
            rounded.to(module.dtype).to(device),
            scale,
            torch.full_like(scale, 2 ** (config.bits - 1)),
            torch.arange(task.columns, dtype=torch.int32) // size,
            time.time() - began,
            lost / task.nsamples,
            damp,
            task.nsamples,
        )


def _sum_a_pass_at_once() -> None:
    """Add what a pass adds to a Hessian in one product.

    gptqmodel makes one for each row: of 40 tokens, it is mostly the Hessian that is moved.
    """
    from gptqmodel.looper.gptq_processor import GPTQProcessor

    processor: Any = GPTQProcessor
    theirs = processor.pre_process_fwd_hook

    def hook_of(self: Any, name: str) -> Callable[..., None]:
        take = theirs(self, name)

        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            mask = getattr(getattr(self, "_mask_tls", None), "value", None)
            read = inputs[0]
            if mask is None or read.dim() != 3 or mask.shape != read.shape[:2]:
                take(module, inputs, output)
                return
            self._mask_tls.value = None
            try:
                take(module, (read[mask.bool()][None],), output)
            finally:
                self._mask_tls.value = mask

        return hook

    processor.pre_process_fwd_hook = hook_of


def _sum_one_half() -> None:
    """Multiply for a Hessian's upper half alone, block by block, and mirror it in the end."""
    import torch
    from gptqmodel.quantization.gptq import GPTQ

    task: Any = GPTQ
    whole = task.materialize_global_hessian

    def upper(self: Any, matrix: torch.Tensor) -> torch.Tensor:
        read = matrix.float()
        size = read.shape[1]
        found = read.new_zeros(size, size)
        step = -(-size // _BLOCKS)
        for start in range(0, size, step):
            own, right = read[:, start : start + step], read[:, start:]
            torch.matmul(own.T, right, out=found[start : start + step, start:])
        return found

    def mirrored(self: Any, target_device: torch.device | None = None) -> None:
        summed = self._hessian_dirty
        whole(self, target_device)
        if summed and self.H is not None:
            self.H.triu_()
            self.H.add_(self.H.triu(1).T)

    task.compute_hessian_xtx = upper
    task.materialize_global_hessian = mirrored


def _multiply_once() -> None:
    """Run a linear layer over a pass once, when it is quantized.

    gptqmodel goes through a decoder layer five times: up to each of the four places whose inputs it
    wants, and through all of it in the end. What a quantized linear layer has made of a pass is
    kept until the decoder layer is done; and of the one at which gptqmodel breaks off, whose input
    alone is wanted, nothing is made.
    """
    import torch
    from gptqmodel.looper.gptq_processor import GPTQProcessor
    from gptqmodel.nn_modules.hooked_linear import STOP_FORWARD_EXCEPTION, HookedLinear

    processor: Any = GPTQProcessor
    linear: Any = HookedLinear
    set_batch, process = processor._set_current_batch_index, processor.process
    forward = linear.forward
    # Of this thread: gptqmodel has a thread for each device, and there is but one.
    current = threading.local()

    def note_batch(self: Any, batch_index: int | None) -> None:
        current.batch = batch_index
        set_batch(self, batch_index)

    def process_and_keep(self: Any, module: Any, *arguments: Any, **options: Any) -> None:
        process(self, module, *arguments, **options)
        module.module.mst_products = {}

    def forward_once(self: Any, read: torch.Tensor) -> torch.Tensor:
        # None where another method than GPTQ runs.
        batch, kept = getattr(current, "batch", None), getattr(self, "mst_products", None)
        near = self.weight.device == read.device
        if batch is not None and near and self.forward_hook and self.forward_hook_last:
            self.forward_hook(self, (read,), read.new_empty((*read.shape[:-1], 0)))
            raise STOP_FORWARD_EXCEPTION.with_traceback(None)
        if kept is None or batch is None:
            made: torch.Tensor = forward(self, read)
            return made
        # A layer that the model uses twice reads something else the second time.
        if batch not in kept or not torch.equal(kept[batch][0], read[..., -1, :]):
            kept[batch] = read[..., -1, :].clone(), forward(self, read)
        # Copied, because a model may go on in place.
        again: torch.Tensor = kept[batch][1].clone()
        return again

    processor._set_current_batch_index = note_batch
    processor.process = process_and_keep
    linear.forward = forward_once
