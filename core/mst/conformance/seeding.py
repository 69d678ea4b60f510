"""Checks of random numbers: a seed and a saved state bring the same draws back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.conformance.activation import torch_device
from mst.conformance.findings import Context, Finding, verdict
from mst.conformance.processes import first_line

if TYPE_CHECKING:
    import torch


def _draws(device: torch.device) -> torch.Tensor:
    import torch

    ones = torch.ones(512, device=device)
    drawn = [torch.randn(512, device=device), torch.nn.functional.dropout(ones, 0.5)]
    return torch.cat(drawn).cpu()


def seeds_repeat(context: Context) -> Finding:
    """Check that one seed gives one sequence, another seed another, and no sequence repeats."""
    import torch

    device = torch_device(context.subject)
    torch.manual_seed(7)
    first, going_on = _draws(device), _draws(device)
    torch.manual_seed(7)
    again = _draws(device)
    torch.manual_seed(8)
    other = _draws(device)
    own = torch.Generator(device=device)
    alone = [
        torch.randn(64, device=device, generator=own.manual_seed(seed)).cpu() for seed in (7, 7, 8)
    ]
    faults = []
    if not torch.equal(first, again):
        faults.append("torch.manual_seed(7) twice gives different randn and dropout")
    if torch.equal(first, other):
        faults.append("seeds 7 and 8 give the same numbers: the seed is ignored")
    if torch.equal(first, going_on):
        faults.append("the second draw repeats the first")
    if not torch.equal(alone[0], alone[1]) or torch.equal(alone[0], alone[2]):
        faults.append("a torch.Generator of the device ignores its seed")
    return verdict(
        faults,
        "seed the device's default generator in its module's manual_seed_all",
        "seeds repeat and differ",
    )


def states_return(context: Context) -> Finding:
    """Check that a saved state of the device's generator brings the same draws back."""
    import torch

    device = torch_device(context.subject)
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    faults = []
    try:
        torch.manual_seed(7)
        _draws(device)
        state = module.get_rng_state()
        first = _draws(device)
        module.set_rng_state(state.clone())
        again = _draws(device)
    except Exception as error:
        faults.append(
            f"get_rng_state and set_rng_state: {type(error).__name__}: {first_line(str(error))}"
        )
    else:
        if state.dtype != torch.uint8 or state.device.type != "cpu":
            faults.append(f"the state is {state.dtype} on {state.device}, not uint8 on the CPU")
        if not torch.equal(first, again):
            faults.append("what is drawn after set_rng_state differs")
    return verdict(
        faults,
        f"give torch.{device.type} get_rng_state() and set_rng_state(): resume needs them",
        "a saved state brings the draws back",
    )
