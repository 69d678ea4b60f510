"""What the worker changes in gptqmodel 7.6.0: going on after a kill, privacy, AWQ's searches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mst_plugins.awq_clipping import best_clips
from mst_plugins.gptqmodel_gptq import quicken_gptq
from mst_plugins.sealed_continuation import sealed_codec

if TYPE_CHECKING:
    import torch

# Between two layers that are kept: as many times what keeping one takes.
_KEEPING_APART = 10
_NEVER = 1 << 30


def patch(key: bytes) -> None:
    """Change the gptqmodel of this process.

    Args:
        key: that the calibration's activations are encrypted with, from `key_from_rows`.
    """
    _seal_activations(key)
    _go_on_with_any_architecture()
    _keep_layers_seldom()
    _measure_no_memory()
    _pack_awq_in_float16()
    _search_awq_as_published()
    quicken_gptq()
    _let_failures_surface()


def stop_noted() -> Callable[[], bool]:
    """Return what says whether Ctrl-C has come since: after its last layer gptqmodel forgets it."""
    from gptqmodel.looper.checkpoint import CheckpointExtension

    extension: Any = CheckpointExtension
    request_stop = extension.request_stop
    asked = False

    def note(self: Any) -> None:
        nonlocal asked
        asked = True
        request_stop(self)

    extension.request_stop = note
    return lambda: asked


def _seal_activations(key: bytes) -> None:
    from gptqmodel.looper import checkpoint

    untyped: Any = checkpoint
    untyped.ContinuationCodec = sealed_codec(untyped.ContinuationCodec, key)


def _go_on_with_any_architecture() -> None:
    """Let the caller decide: gptqmodel has tried two architectures, and refuses the others."""
    from gptqmodel.looper import gptq_checkpoint

    untyped: Any = gptq_checkpoint
    untyped.validate_checkpoint_support = lambda *_, **__: None


def _keep_layers_seldom() -> None:
    """Let keeping what a killed run goes on from take a tenth of the time at most.

    gptqmodel keeps it after every layer, and reads all that it has kept again: 40 MB and more for a
    layer that takes two seconds. A kill now costs the time of ten such writes at most, or a layer.
    """
    from gptqmodel.looper.checkpoint import CheckpointExtension
    from gptqmodel.looper.checkpoint_store import CheckpointConfig

    extension: Any = CheckpointExtension
    config: Any = CheckpointConfig
    on_boundary = extension.on_boundary
    due = time.monotonic()

    def keep_when_due(self: Any, boundary: Any) -> None:
        nonlocal due
        before, began = self._committed_cursor, time.monotonic()
        try:
            on_boundary(self, boundary)
        finally:
            if self._committed_cursor != before:
                ended = time.monotonic()
                due = ended + _KEEPING_APART * (ended - began)

    def interval(self: Any) -> int:
        return 1 if time.monotonic() >= due else _NEVER

    extension.on_boundary = keep_when_due
    config.interval_layers = property(interval)


def _measure_no_memory() -> None:
    """Start no thread that reads five times a second what memory is used, for a log."""
    from gptqmodel.looper.loop_processor import LoopProcessor

    processor: Any = LoopProcessor
    processor._init_cpu_device_handle = lambda self: None


def _pack_awq_in_float16() -> None:
    """Keep AWQ's scales and biases in float16, as what reads them expects.

    A model in bfloat16 gives them in that, and gptqmodel then can't go on from its own files.
    """
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer: Any = AwqTorchLinear
    pack = layer.pack

    def pack_in_float16(self: Any, linear: Any, scales: Any, zeros: Any, g_idx: Any = None) -> None:
        pack(self, linear, scales.half(), zeros, g_idx)
        if self.bias is not None:
            self.bias = self.bias.half()

    layer.pack = pack_in_float16


def _search_awq_as_published() -> None:
    """Let AWQ search as its paper has it, and for its clipping in a fraction of the time.

    Scales are powers of the inputs' size (Lin et al. 2023, equation 5), none at all among them.
    gptqmodel divides by powers of the weights' size too, which has no place for leaving well-placed
    weights as they are: SmolLM2-135M tuned on the demo came to 1.5 times its perplexity, and comes
    to less than 1.1 this way. Its search for the clipping took 95 % of the time.
    """
    from gptqmodel.looper.awq_processor import AWQProcessor

    processor: Any = AWQProcessor
    begin = processor.__init__

    def begin_with_inputs_alone(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.duo_scaling = False

    def clips(self: Any, w: torch.Tensor, input_feat: torch.Tensor, **_: Any) -> torch.Tensor:
        import torch

        def rounded(weights: torch.Tensor) -> torch.Tensor:
            made = torch.empty_like(weights)
            self._pseudo_quantize_tensor_into(weights, made)
            return made

        with torch.inference_mode():
            return best_clips(w, input_feat, self.qcfg.group_size, rounded).to(w.dtype)

    processor.__init__ = begin_with_inputs_alone
    processor._compute_best_clip = clips


def _let_failures_surface() -> None:
    """Raise what fails in a thread where it is waited for, in place of ending the process."""
    from gptqmodel.utils import threadx

    untyped: Any = threadx
    untyped._DeviceWorker._abort_process = lambda *_: None
