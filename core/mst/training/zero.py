"""DeepSpeed under our own loop: it shares out optimizer, gradients and weights over the ranks.

Which rows a step has, its loss, rate and checkpoints stay ours. DeepSpeed gathers weights in the
forward pass and reduces gradients in the backward pass, so every rank makes as many passes as all
others, and a rank that fails inside one ends the job: nobody can wait for it to agree.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mst.errors import PlanError, RunError
from mst.training.adapters import trained_parameters

if TYPE_CHECKING:
    import torch

    from mst.training.parallel import Group

# torch's device types to DeepSpeed's accelerators (its SUPPORTED_ACCELERATOR_LIST).
ACCELERATORS = {"cpu": "cpu", "cuda": "cuda", "npu": "npu", "xpu": "xpu", "mlu": "mlu"}
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Zero:
    """A model that DeepSpeed holds.

    Attributes:
        engine: DeepSpeed's, called like the model.
        stage: of ZeRO, 1 to 3.
        parameters: the trained weights by name.
        world_size: ranks in all.
    """

    engine: Any
    stage: int
    parameters: Mapping[str, torch.nn.Parameter]
    world_size: int


def environment(device_type: str, build_dir: str) -> dict[str, str]:
    """Return variables for a worker that DeepSpeed runs in.

    Args:
        device_type: torch's name of the devices.
        build_dir: of this run alone, for what is compiled: a lock that a killed build has left
            behind in a shared place would hang every later run.

    Raises:
        PlanError: DeepSpeed doesn't know such devices.
    """
    if device_type not in ACCELERATORS:
        raise PlanError(
            f"DeepSpeed does not know {device_type!r} devices (it knows"
            f" {', '.join(sorted(ACCELERATORS))}). Pass --deepspeed off."
        )
    return {
        # Else it imports whatever vendor's extension it finds, and guesses.
        "DS_ACCELERATOR": ACCELERATORS[device_type],
        "TORCH_EXTENSIONS_DIR": build_dir,
        "TRITON_CACHE_DIR": build_dir,
        "DS_BUILD_OPS": "0",
    }


def import_deepspeed() -> Any:
    """Return the module, silent and with nothing to compile.

    Raises:
        PlanError: it is not installed, or can't be loaded here.
    """
    logging.disable(logging.WARNING)  # it tells on import what it guesses
    try:
        import deepspeed
    except (ImportError, RuntimeError, ValueError) as error:
        raise PlanError(
            f"the plan needs DeepSpeed, which can't be loaded: {str(error)[:200]}."
            " DS_BUILD_OPS=0 python -m pip install 'mst-train[deepspeed]', or --deepspeed off."
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    module: Any = deepspeed
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls torch 2.13's collectives by their former names.
    former = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    warnings.filterwarnings("ignore", former, FutureWarning)
    # A CPU collective that would be compiled at every start; gloo does the same.
    module.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module


def check_offload(config: Mapping[str, Any]) -> None:
    """Make sure that what the configuration wants on a disk can be written there.

    Raises:
        PlanError: DeepSpeed's asynchronous file operator can't be built here.
    """
    section = config["zero_optimization"]
    parts = (section.get("offload_optimizer"), section.get("offload_param"))
    if not any(part and part.get("device") == "nvme" for part in parts):
        return
    builder = import_deepspeed().ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise PlanError(
            "--offload-dir was given; DeepSpeed's aio operator, which reads and writes there, can't"
            " be built here (it needs a C++ compiler and libaio's headers: apt install libaio-dev)."
            " Leave --offload-dir out to offload to the host's memory."
        )


def start(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    device: torch.device,
    group: Group,
) -> Zero:
    """Hand the model and its optimizer to DeepSpeed; the ranks have met.

    Args:
        model: ready to be trained, on `device`, or on the host for stage 3, where it goes to the
            device weight by weight.
        optimizer: torch's AdamW over its trained weights.
        config: from `deepspeed_config`.
        device: of this rank.
        group: this rank's place.

    Raises:
        PlanError: DeepSpeed is not here, or can't offload where it should.
    """
    import torch

    deepspeed = import_deepspeed()
    check_offload(config)
    # DeepSpeed reads this rank's device from here, and nowhere else.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    parameters = dict(trained_parameters(model))
    logging.disable(logging.WARNING)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=list(parameters.values()),
            config=dict(config),
            dist_init_required=False,
        )
    finally:
        logging.disable(logging.NOTSET)
    zero = Zero(engine, config["zero_optimization"]["stage"], parameters, group.world_size)
    with torch.no_grad():
        _allocate_moments(zero)
    return zero


def _flats(zero: Zero) -> list[torch.Tensor]:
    """Return this rank's shares of the trained weights, in float32: what AdamW sees."""
    optimizer = zero.engine.optimizer
    if zero.stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _allocate_moments(zero: Zero) -> None:
    """Make AdamW's state, so that it can be read and set before the first step."""
    import torch

    inner = zero.engine.optimizer.optimizer
    for flat in _flats(zero):
        state = inner.state[flat]
        if flat.numel() and not set(_MOMENTS) <= set(state):
            state["step"] = torch.tensor(0.0)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(flat)
    if zero.stage < 3:
        zero.engine.optimizer._lazy_init_hp_params_optimizer_state()


def backward(zero: Zero, loss: torch.Tensor) -> None:
    """Add up the gradients of a loss that is this rank's part of the global batch's."""
    # DeepSpeed takes the mean over the ranks; ours is a sum.
    zero.engine.backward(loss * zero.world_size, scale_wrt_gas=False)


def step(zero: Zero) -> tuple[float, bool]:
    """Clip the gradients and let AdamW step.

    Returns:
        The gradients' norm before clipping, and whether weights changed: they don't when float16
        overflowed, and DeepSpeed has then lowered its scale.
    """
    zero.engine.step()
    norm = zero.engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm), bool(zero.engine.was_step_applied())


def loss_scale(zero: Zero) -> float:
    """Return what float16's loss is multiplied by; 1 in other dtypes."""
    return float(zero.engine.optimizer.loss_scaler.cur_scale)


def set_loss_scale(zero: Zero, scale: float) -> None:
    """Go on with the scale of a checkpoint."""
    zero.engine.optimizer.loss_scaler.cur_scale = scale


def weights(zero: Zero, group: Group) -> dict[str, torch.Tensor]:
    """Return the trained weights in float32 on the host; every rank takes part, rank 0 gets them.

    Args:
        zero: from `start`.
        group: this rank's place.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in zero.parameters.items():
        whole = safe_get_full_fp32_param(parameter)
        if group.first:
            found[name] = whole.detach().cpu().clone()
    return found


def optimizer_tensors(zero: Zero, group: Group) -> dict[str, torch.Tensor]:
    """Return AdamW's state as `mst.training.optimizers.optimizer_tensors` names it, on rank 0."""
    import torch
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = zero.engine.optimizer.optimizer
    steps = [state["step"] for state in inner.state.values() if "step" in state]
    found = {}
    for name, parameter in zero.parameters.items():
        for kind in _MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, kind)
            if group.first:
                found[f"{kind}/{name}"] = whole.detach().cpu().clone()
        if group.first:
            found[f"step/{name}"] = torch.as_tensor(float(steps[0]))
    return found


def set_weights(zero: Zero, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Put whole weights back, of which each rank keeps its share.

    Args:
        zero: from `start`.
        tensors: name and value; every rank gets the same, in the same order.

    Raises:
        RunError: they belong to another model.
    """
    import torch
    from deepspeed.utils import safe_set_full_fp32_param

    with torch.no_grad():
        for name, value in tensors:
            parameter = _named(zero, name)
            if zero.stage == 3:
                _set_share(parameter, value, None)
                parameter.ds_tensor.data.copy_(_share(parameter, value))
                if parameter.shape == value.shape:  # kept whole, or gathered ahead
                    parameter.data.copy_(value)
            else:
                parameter.data.copy_(value)
                safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def set_optimizer(zero: Zero, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Put back what `optimizer_tensors` returned, on every rank.

    Raises:
        RunError: the tensors belong to other parameters, or to another optimizer.
    """
    import torch
    from deepspeed.utils import safe_set_full_optimizer_state

    with torch.no_grad():
        for key, value in tensors:
            kind, _, name = key.partition("/")
            if kind == "step":
                for state in zero.engine.optimizer.optimizer.state.values():
                    if "step" in state:
                        state["step"] = torch.as_tensor(float(value))
                continue
            parameter = _named(zero, name)
            if kind not in _MOMENTS:
                raise RunError(
                    f"the checkpoint's optimizer keeps {kind!r}; DeepSpeed shares out torch's AdamW"
                    " only. Resume with --deepspeed off."
                )
            if zero.stage == 3:
                _set_share(parameter, value, kind)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)


def _named(zero: Zero, name: str) -> Any:
    if name not in zero.parameters:
        raise RunError(
            f"the checkpoint holds {name!r}, which this run does not train."
            " Resume with the options that the run was started with."
        )
    return zero.parameters[name]


def _share(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole tensor; the last part is filled up with zeros."""
    import torch

    size = parameter.ds_tensor.ds_numel
    padded = torch.zeros(size * parameter.ds_zero_partition_world_size, dtype=value.dtype)
    padded[: value.numel()] = value.reshape(-1).cpu()
    return padded.narrow(0, size * parameter.ds_zero_partition_rank, size)


def _set_share(parameter: Any, value: torch.Tensor, kind: str | None) -> None:
    """Set this rank's part of the float32 weight, or of a moment.

    DeepSpeed's function for whole tensors can't take sizes that the ranks don't divide.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    share = _share(parameter, value).float()
    if kind is None:
        safe_set_local_fp32_param(parameter, share)
    else:
        safe_set_local_optimizer_state(parameter, share, kind)
