"""The optimizers of a plan, and their state as named tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mst.errors import RunError
from mst.training.adapters import trained_parameters
from mst.training.quantization import import_bitsandbytes

if TYPE_CHECKING:
    import torch

    from mst.request import TrainRequest

# The codebooks of 8-bit moments: signed for the first, unsigned for the second. All weights of an
# optimizer share them, so a checkpoint holds each once.
_CODEBOOKS = ("qmap1", "qmap2")
# What bitsandbytes keeps in pages that move between device and host when memory is short.
_PAGED = ("state1", "state2")


def make_optimizer(
    model: torch.nn.Module, request: TrainRequest, rate: float, optim: str = "adamw_torch"
) -> torch.optim.Optimizer:
    """Return AdamW over the trained weights; norms and biases don't decay, as in transformers.

    Args:
        model: ready to be trained.
        request: its hyperparameters.
        rate: the learning rate.
        optim: "adamw_torch", or "adamw_8bit" or "paged_adamw_8bit" of bitsandbytes: moments in 8
            bits by blocks of 256 (Dettmers et al. 2021, "8-bit Optimizers via Block-wise
            Quantization"), those of weights under 4096 elements in float32.

    Raises:
        ModelError: bitsandbytes is asked for and can't be loaded.
    """
    import torch

    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for _, parameter in trained_parameters(model):
        (decayed if parameter.ndim >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": request.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    make: Any = torch.optim.AdamW
    on_cpu = all(each.device.type == "cpu" for each in (*decayed, *others))
    if on_cpu and request.fused_adamw != "off":
        # One kernel a weight: a step over the 420 matrices of SmolLM2's adapters took 8 ms, plain
        # 48 and foreach 21 (two cores of an AMD EPYC, Zen 4).
        make = functools.partial(make, fused=True)
    if optim != "adamw_torch":
        eight_bit = import_bitsandbytes().optim
        make = {
            "adamw_8bit": eight_bit.AdamW8bit,
            "paged_adamw_8bit": eight_bit.PagedAdamW8bit,
        }[optim]
    made: torch.optim.Optimizer = make(
        [group for group in groups if group["params"]],
        lr=rate,
        betas=(request.adam_beta1, request.adam_beta2),
        eps=request.adam_epsilon,
    )
    return made


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as named tensors: "exp_avg/<parameter>" and so on.

    Args:
        optimizer: from `make_optimizer`.
        names: `id` of each parameter to its name.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key in _CODEBOOKS:
                found[key] = value
            else:
                # bitsandbytes counts its steps in a plain integer.
                found[f"{key}/{names[id(parameter)]}"] = torch.as_tensor(value)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises:
        RunError: the tensors belong to other parameters.
    """
    by_name = {
        names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]
    }
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind in _CODEBOOKS:
            continue
        if name not in by_name:
            raise RunError(
                f"the checkpoint's optimizer holds {name!r}, which this run does not train."
                " Resume with the options that the run was started with."
            )
        parameter, group = by_name[name]
        optimizer.state[parameter][kind] = _placed(optimizer, parameter, group, kind, value)
    _share_codebooks(optimizer, tensors)


def _placed(
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    group: Mapping[str, Any],
    kind: str,
    value: torch.Tensor,
) -> Any:
    """Return one piece of state as the optimizer holds it."""
    buffer = getattr(optimizer, "get_state_buffer", None)
    if buffer is None:
        # AdamW keeps its step counter on the host unless it is fused or capturable.
        on_host = kind == "step" and not (group.get("fused") or group.get("capturable"))
        return value if on_host else value.to(parameter.device)
    if kind == "step":
        return int(value)
    if kind not in _PAGED:
        return value.to(parameter.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        held: torch.Tensor = buffer(parameter, dtype=value.dtype)
    return held.copy_(value)


def _share_codebooks(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    shared: dict[tuple[str, torch.device], torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        if "absmax1" not in state:
            continue
        for key in _CODEBOOKS:
            place = (key, parameter.device)
            if place not in shared:
                shared[place] = tensors[key].to(parameter.device)
            state[key] = shared[place]
