"""A LoRA layer's two products summed up before the one rounding that both share.

PEFT adds an adapter's product to that of its frozen weight, which is in bfloat16 by then. What the
first steps learn is less than half the distance to the next bfloat16 number, so that the sum is the
frozen weight's own product again: not noise, but a part of the adapter that no token meets. Here
the adapter's product is what the larger one is added to, in float32, before it is rounded.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def fuse_adapters(model: torch.nn.Module) -> None:
    """Have a model's LoRA layers add their products before rounding, under autocast.

    It is what PEFT computes but for rounding. Layers with DoRA, on quantized weights of other
    devices than a CPU, and all that are no linear layers stay PEFT's own, and so do passes with the
    adapter switched off or merged.

    Args:
        model: of PEFT, or one without adapters, which stays as it is.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import LoraLayer
    from torch import nn

    from mst.training.quantized_products import adding_product

    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
            layer.__class__ = _fused(Linear, _add_product)
        elif isinstance(layer, LoraLayer) and (adding := adding_product(layer.base_layer)):
            layer.__class__ = _fused(type(layer), adding)


def _add_product(layer: Any, update: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    from mst.training.quantized_products import added

    return added(update, x, layer.weight)


@functools.cache
def _fused(kind: type[Any], add: Callable[[Any, torch.Tensor, torch.Tensor], Any]) -> type[Any]:
    """Return a subclass of PEFT's layer; a subclass, so that a copied model's use its weights.

    Args:
        kind: PEFT's layer.
        add: its frozen weight's product to an update.
    """
    import torch

    class Fused(kind):  # type: ignore[misc]
        def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            active = self.active_adapters
            if (
                args or kwargs or self.disable_adapters or self.merged
                or not torch.is_autocast_enabled(x.device.type)
                or hasattr(self.base_layer.weight, "ds_id")  # DeepSpeed gathers what layers read
                or len(active) != 1 or active[0] not in self.lora_A
                or active[0] in self.lora_variant
            ):  # fmt: skip
                found: torch.Tensor = kind.forward(self, x, *args, **kwargs)
                return found
            (name,) = active
            down, up = self.lora_A[name], self.lora_B[name]
            # The narrow product takes the factor: it is much smaller than the update.
            update = up(down(self.lora_dropout[name](x)) * self.scaling[name])
            base = self.base_layer
            summed: torch.Tensor = add(base, update, x)
            # Added to the update, a bias would round it away too.
            return summed if base.bias is None else summed + base.bias.to(summed.dtype)

    # What prints or names a layer's kind goes on with PEFT's name.
    Fused.__name__, Fused.__qualname__ = kind.__name__, kind.__qualname__
    Fused.__module__ = kind.__module__
    return Fused
