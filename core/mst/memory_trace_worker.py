"""Run as `python -m mst.memory_trace_worker`: a trace request on stdin, its estimate on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mst.configuration import Configuration, recomputed_layers
from mst.extensions import hide_extensions, hide_packages
from mst.live_storages import LiveStorages, counted
from mst.memory import StepShape
from mst.memory_trace import TraceEstimate, TraceRequest
from mst.memory_trace_model import build, build_config, layer_period, materialized
from mst.request import TrainRequest
from mst.serial import from_json, to_json

if TYPE_CHECKING:
    import torch

    from mst.training.batches import Batch

PHASES = ("forward", "late", "early", "optimizer")
# Models up to so many layers are traced whole.
WHOLE_LAYERS = 4
# Layers that are recomputed, and those above them that are not.
Depth = tuple[int, int]


def estimate(asked: TraceRequest) -> TraceEstimate:
    """Return what the step takes: traced at small depths and extended to the model's own."""
    began = time.perf_counter()
    layers = build_config(asked, None).num_hidden_layers
    again = recomputed_layers(asked.configuration, layers)
    own = (again, layers - again)
    depths = _depths(own, layer_period(asked))
    traced = [_step(asked, depth) for depth in depths]
    found = {name: _extended(depths, [each[name] for each in traced], own) for name in traced[0]}
    return TraceEstimate(
        weights_bytes=found["weights"],
        steady_bytes=found["steady"],
        forward_bytes=found["forward"],
        late_bytes=found["late"],
        early_bytes=found["early"],
        optimizer_bytes=found["optimizer"],
        layers_traced=tuple(map(sum, depths)),
        seconds=round(time.perf_counter() - began, 2),
    )


def _depths(own: Depth, period: int) -> list[Depth]:
    """Return what to trace: the model itself, or a small one and one that is larger a kind."""
    few, more = (2 * period, 3 * period) if period > 1 else (2, 4)
    kinds = [place for place in (0, 1) if own[place]]
    if sum(own) <= max(WHOLE_LAYERS, few * (len(kinds) - 1) + more):
        return [own]
    small = (few if own[0] else 0, few if own[1] else 0)
    return [small, *((more, small[1]) if place == 0 else (small[0], more) for place in kinds)]


def _extended(depths: list[Depth], values: list[int], own: Depth) -> int:
    small, found = depths[0], float(values[0])
    for depth, value in zip(depths[1:], values[1:], strict=True):
        place = 0 if depth[0] != small[0] else 1
        slope = (value - values[0]) / (depth[place] - small[place])
        found += slope * (own[place] - small[place])
    return round(found)


def _step(asked: TraceRequest, depth: Depth) -> dict[str, int]:
    """Return the bytes that are live in each phase of the second step at this depth."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mst.training.block_attention import use_block_attention
    from mst.training.optimizers import make_optimizer

    made = asked.configuration
    if made.block_attention:
        use_block_attention()
    model = build(asked, sum(depth), depth[0])
    live = LiveStorages()
    marks: dict[str, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), _autocast_lists(asked.on_host), counted(live):
        materialized(model)
        marks["weights"] = live.bytes
        optimizer = make_optimizer(model, TrainRequest(), 1e-4)
        for group in optimizer.param_groups:
            # As on the device: one kernel a weight on a CPU, loops over lists on accelerators.
            group.update(fused=asked.on_host, foreach=not asked.on_host)
        batches = [_batch(asked.step, made) for _ in range(min(made.accumulation, 2))]
        _watch_layers(model, live, marks)
        with _attention(asked.attention_kernel), _masks_as_given():
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                marks |= dict.fromkeys(PHASES, 0)
                marks["steady"] = live.bytes
                live.restart()
                for batch in batches:
                    _gradients(model, batch, made, live, marks)
                weights = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                _mark(live, marks, "optimizer")
    return marks


def _mark(live: LiveStorages, marks: dict[str, int], name: str) -> None:
    """Close a phase: note its peak, and begin the next one."""
    marks[name] = max(marks.get(name, 0), live.peak)
    live.restart()


def _gradients(
    model: torch.nn.Module,
    batch: Batch,
    made: Configuration,
    live: LiveStorages,
    marks: dict[str, int],
) -> None:
    import torch

    from mst.training.loss import compute_in, logits_of, summed_loss
    from mst.training.output_head import HeadForm

    with compute_in(model, "cpu", getattr(torch, made.compute_dtype)):
        how = HeadForm() if made.chunked_loss else logits_of(model)
        loss = summed_loss(model, batch, how)
    loss = loss / 2.0
    _mark(live, marks, "forward")
    (loss * 1.0).backward()  # type: ignore[no-untyped-call]
    del loss
    _mark(live, marks, "early")


def _watch_layers(model: torch.nn.Module, live: LiveStorages, marks: dict[str, int]) -> None:
    """Note the peak when the backward pass leaves the last layer, and when it nears the first."""
    from mst.training.adapters import under_adapters

    inner = under_adapters(model)
    layers = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    from mst.memory_trace_model import decoder_layers

    stack = decoder_layers(layers)

    def watch(layer: torch.nn.Module, name: str) -> None:
        def before(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else named.get("hidden_states")
            if hidden is not None and hidden.requires_grad and not hidden.is_leaf:
                hidden.register_hook(lambda _: _mark(live, marks, name))

        layer.register_forward_pre_hook(before, with_kwargs=True)

    if len(stack) > 1:
        watch(stack[-1], "late")
    if len(stack) > 2:
        watch(stack[1], "middle")


@contextlib.contextmanager
def _attention(kernel: str) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if kernel != "math":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def _masks_as_given() -> Iterator[None]:
    """Keep transformers from making masks for packed rows, which it does wherever it can't look.

    A real step reads from the positions whether rows are packed; here the batch says so.
    """
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


@contextlib.contextmanager
def _autocast_lists(on_host: bool) -> Iterator[None]:
    """Give the fake tensors, which are of the CPU, the accelerators' float32 operators."""
    import torch
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    class Accelerator(TorchFunctionMode):
        # torch's list for accelerators (ATen/autocast_mode.h, AT_FORALL_FP32) has these, the CPU's
        # has not; what else differs doesn't occur in decoders, or is float32 there anyway.
        float32 = (F.layer_norm, F.softmax, torch.pow, torch.Tensor.pow)

        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function in self.float32 and torch.is_autocast_enabled("cpu"):
                args = tuple(
                    each.float()
                    if isinstance(each, torch.Tensor) and each.is_floating_point()
                    else each
                    for each in args
                )
            return function(*args, **(kwargs or {}))

    if on_host:
        yield
        return
    with Accelerator():
        yield


def _batch(step: StepShape, made: Configuration) -> Batch:
    """Return a micro-batch of the step's shape, without data."""
    import torch

    from mst.memory.shape import logit_columns, mask_values
    from mst.training.batches import Batch

    rows, width = step.rows, step.width or step.tokens // step.rows
    kept = logit_columns(step)
    ids = torch.zeros(rows, width, dtype=torch.long)
    mask = None
    if mask_values(step) or made.attention == "eager":
        # As transformers makes it: boolean for torch's own attention, to be added otherwise.
        whole = made.attention == "eager"
        height = rows if mask_values(step) > width * width else 1
        kind = getattr(torch, made.weights_dtype) if whole else torch.bool
        mask = torch.zeros(height, 1, width, width, dtype=kind)
    return Batch(
        input_ids=ids,
        position_ids=torch.zeros(rows, width, dtype=torch.long),
        attention_mask=mask,
        keep=torch.zeros(kept, dtype=torch.long),
        targets=torch.zeros(rows, kept, dtype=torch.long),
        labelled=torch.arange(min(step.label_tokens, rows * kept)),
        tokens=rows * width,
        label_tokens=rows * kept,
    )


def main() -> int:
    """Trace what stdin asks for; the last line of stdout is the estimate."""
    found = estimate(from_json(TraceRequest, json.load(sys.stdin)))
    print(json.dumps(to_json(found)))
    return 0


if __name__ == "__main__":
    hide_extensions()
    hide_packages(keep=("bitsandbytes",))
    sys.exit(main())
