"""Whether what recomputed layers keep may lie in the host's memory."""

from __future__ import annotations

from mst.errors import PlanError
from mst.facts import Capabilities, DeviceFacts
from mst.request import TrainRequest


def offloading_obstacle(request: TrainRequest, able: Capabilities) -> str:
    """Return why activations can't be kept on the host, or ""; "off" is a reason too."""
    if request.activation_offloading == "off":
        return "--activation-offloading off"
    if able.torch_device == "cpu":
        return "a CPU's activations are in the host's memory already"
    if request.gradient_checkpointing == "off":
        return (
            "what is kept on the host is what recomputed layers need, and --gradient-checkpointing"
            " off recomputes none"
        )
    if request.dp_epsilon is not None:
        return "with --dp-epsilon layers are recomputed in torch's older form"
    return ""


def check_offloading(request: TrainRequest, device: DeviceFacts, able: Capabilities) -> None:
    """Make sure that offloading can be done where it was asked for.

    Raises:
        PlanError: it can't; says why.
    """
    if request.activation_offloading != "on":
        return
    if obstacle := offloading_obstacle(request, able):
        raise PlanError(
            f"--activation-offloading on was asked for on {device.name}: {obstacle}. Pass"
            " --activation-offloading auto."
        )
