"""What recomputed layers keep for the backward pass, in the host's memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.training.adapters import decoder_layers, under_adapters

if TYPE_CHECKING:
    import torch

# As transformers calls what checkpoints a layer: the layer's forward pass, then its inputs.
Checkpointed = Callable[..., Any]


def offload_activations(model: torch.nn.Module, device: torch.device) -> int:
    """Keep the recomputed layers' hidden states on the host; return of how many layers.

    A layer that is recomputed keeps the hidden states that it was given and nothing else. They are
    copied to pinned memory while the layer computes, and are back when its turn in the backward
    pass comes, so that a device holds those of two layers instead of all. The last recomputed
    layer's stay: they are wanted first. Copies are exact, so losses are what they were. torchtune
    offloads what is left after checkpointing too (its `enable_activation_offloading`), and so does
    transformers 5.23 (`activation_checkpointing_enable(offload=True)`), whose copies the computing
    waits for.

    Args:
        model: on `device`, with checkpointing enabled.
        device: an accelerator.
    """
    layers: list[Any] = [each for each in decoder_layers(model) if each.gradient_checkpointing]
    # transformers asks for a gradient of the embedding's output, for the sake of torch's older form
    # of checkpointing. Adapters need none, and it would keep the first layer's states here.
    under_adapters(model).disable_input_require_grads()
    shelf = _Shelf(device, _side_stream(device))
    for place, each in enumerate(layers):
        each._gradient_checkpointing_func = shelf.keeping(
            each._gradient_checkpointing_func,
            first=place == 0,
            stays=place == len(layers) - 1,
        )
    return max(0, len(layers) - 1)


def _side_stream(device: torch.device) -> torch.Stream | None:
    """Return a stream for the copies; None where the device has one queue alone."""
    import torch

    try:
        return torch.Stream(device=device)
    except RuntimeError:  # c10's DeviceGuardImplInterface, getNewStream
        return None


@dataclass(eq=False)
class _Kept:
    """One layer's hidden states, and what was kept of the layer below it.

    Attributes:
        tensor: them, on the host or, where they stay, on the device.
        stays: they do.
        below: whose turn comes next in the backward pass.
    """

    tensor: torch.Tensor = field(repr=False)
    stays: bool
    below: _Kept | None = field(repr=False)


class _Shelf:
    """Copies to the host and back, each beside the computing that needs it not.

    A tensor that is being copied is held here until the stream that computes has been told to wait
    for the copy: the allocator may then give its memory to whatever that stream does next. All
    memory of the device is allocated on that stream, so nothing else has to be told.
    """

    def __init__(self, device: torch.device, side: torch.Stream | None) -> None:
        self._device = device
        self._side = side
        self._newest: weakref.ref[_Kept] | None = None
        # What is on its way: down, and up for the layer that is recomputed next.
        self._down: tuple[torch.Tensor, torch.Event] | None = None
        self._up: tuple[weakref.ref[_Kept], torch.Tensor, torch.Event] | None = None
        self._most = 0

    def keeping(self, checkpointed: Checkpointed, first: bool, stays: bool) -> Checkpointed:
        """Return `checkpointed` with its first input kept here.

        Args:
            checkpointed: of a layer.
            first: it is the first layer: a pass begins.
            stays: its input is not copied to the host.
        """
        import torch

        def call(function: Any, *inputs: Any) -> Any:
            if not (inputs and isinstance(inputs[0], torch.Tensor) and torch.is_grad_enabled()):
                return checkpointed(function, *inputs)
            if first:
                self._forget()
            # The hooks live as long as what they have packed, so they must not hold a tensor.
            place, shape = inputs[0].data_ptr(), inputs[0].shape

            def pack(tensor: torch.Tensor) -> Any:
                if tensor.data_ptr() != place or tensor.shape != shape:
                    return tensor
                return self._put(tensor, stays)

            # Over the layer's inputs alone: torch's own hooks lie over what its forward pass saves.
            with torch.autograd.graph.saved_tensors_hooks(pack, self._get):
                return checkpointed(function, *inputs)

        return call

    def _put(self, tensor: torch.Tensor, stays: bool) -> _Kept:
        """Begin the copy of a layer's hidden states to the host, unless they stay."""
        import torch

        self._wait_down()
        kept = tensor.detach()
        if not stays:
            kept = self._pinned(tensor)
            if self._side is None:
                kept.copy_(tensor)
            else:
                self._side.wait_event(torch.accelerator.current_stream(self._device).record_event())
                with self._side:
                    kept.copy_(tensor, non_blocking=True)
                    self._down = (tensor, self._side.record_event())
        found = _Kept(kept, stays, self._newest() if self._newest is not None else None)
        self._newest = weakref.ref(found)
        return found

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return memory of the host for a tensor.

        All blocks are as large as the largest yet: torch keeps pinned memory in a cache for each
        power of two, and so each block serves any later micro-batch. Smaller ones that were handed
        out before the largest micro-batch stay in that cache.
        """
        import torch

        size = tensor.numel() * tensor.element_size()
        self._most = max(self._most, size)
        block = torch.empty(self._most, dtype=torch.uint8, pin_memory=self._side is not None)
        return block[:size].view(tensor.dtype).view(tensor.shape)

    def _get(self, packed: Any) -> torch.Tensor:
        """Return what was packed, and begin to fetch what the layer below will want."""
        if not isinstance(packed, _Kept):
            plain: torch.Tensor = packed
            return plain
        tensor = packed.tensor if packed.stays else self._fetched(packed)
        if packed.below is not None:
            self._fetch(packed.below)
        return tensor

    def _fetched(self, kept: _Kept) -> torch.Tensor:
        """Return a layer's hidden states on the device."""
        if self._up is None or self._up[0]() is not kept:
            self._wait_up()
            self._fetch(kept)
        found = self._wait_up()
        assert found is not None
        return found

    def _fetch(self, kept: _Kept) -> None:
        import torch

        tensor = torch.empty(kept.tensor.shape, dtype=kept.tensor.dtype, device=self._device)
        current = torch.accelerator.current_stream(self._device)
        if self._side is None:
            tensor.copy_(kept.tensor)
            event = current.record_event()
        else:
            # The memory may still be read by what computes before this.
            self._side.wait_event(current.record_event())
            with self._side:
                tensor.copy_(kept.tensor, non_blocking=True)
                event = self._side.record_event()
        self._up = (weakref.ref(kept), tensor, event)

    def _wait_down(self) -> None:
        import torch

        if self._down is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._down[1])
            self._down = None

    def _wait_up(self) -> torch.Tensor | None:
        import torch

        if self._up is None:
            return None
        _, tensor, event = self._up
        torch.accelerator.current_stream(self._device).wait_event(event)
        self._up = None
        return tensor

    def _forget(self) -> None:
        """Let go of what a pass has left that came to no end: memory ran out, or no gradients."""
        self._wait_down()
        self._wait_up()
        self._newest = None
