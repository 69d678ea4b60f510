"""The vendor's manual: every hook of device backends, export targets and objectives.

A plugin is a module (or object) named by an entry point in group `mst`:

    [project.entry-points.mst]
    mychip = "mst_mychip.backend"

A backend must have `mst_backend_name`, `mst_probe` and `mst_capabilities`; an export target must
have `mst_export_name` and `mst_export`; an objective must have `mst_objective_name` and
`mst_objective`; the other hooks may be left out. Each hook is called on one plugin at a time,
never on all of them, so a plugin that fails takes no other with it. A hook may leave out
arguments that it does not need. A hook that is unknown to the installed mst is refused as a
misspelling, unless it is marked `hookimpl(optionalhook=True)`. Each example below is run by the
tests.
"""

# A hook specification is its signature and its docstring; it is never called.
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

from mst.facts import Capabilities, DeviceFacts, Probe

if TYPE_CHECKING:
    from mst.export import ExportReport, ExportRequest
    from mst.objective import Objective
    from mst.request import TrainRequest

hookspec = pluggy.HookspecMarker("mst")
hookimpl = pluggy.HookimplMarker("mst")


@hookspec(firstresult=True)
def mst_backend_name() -> str:
    """Return the backend's short unique name, as users write it after `--device`.

    Called:
        Once, when plugins are loaded, in every process of `mst`.

    Returns:
        Lower-case letters, digits, "-" and "_", beginning with a letter; "auto" is taken. A
        backend always has a name, so there is no way to report nothing.

    If it raises:
        The plugin is listed as failed by `mst plugins`; the others are loaded.

    Example:
        ```python
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_backend_name() -> str:
            return "mychip"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_probe() -> Probe:
    """Return what is here, told from files and vendor tools, without importing torch.

    Called:
        By `mst devices`, `mst doctor`, `mst plan` and `mst train`, in their own process, before
        anything is planned; never in a training worker. It has 5 seconds and should take
        less than 2. It runs in a thread, so it must not install signal handlers.

    Returns:
        A `Probe` with one `DeviceFacts` a device, indexed from 0 in order. With nothing to
        report: `Probe(found=False, usable=False, reason="why")`. Hardware without its driver
        or torch extension: `found=True, usable=False` and what to install as the reason. Every
        number has its origin in `sources`.

    If it raises:
        Or if it is late, or returns another type: the backend counts as not found, and
        `mst doctor` prints what happened. Better to catch and say what to fix.

    Example:
        ```python
        from pathlib import Path

        from mst.facts import DeviceFacts, Probe
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_probe() -> Probe:
            nodes = sorted(Path("/dev").glob("mychip[0-9]*"))
            if not nodes:
                return Probe(found=False, usable=False, reason="no /dev/mychip*: load the driver")
            devices = tuple(
                DeviceFacts("mychip", index, "MyChip 1", "mc1", None, None, ("bfloat16",))
                for index in range(len(nodes))
            )
            return Probe(found=True, usable=True, devices=devices)
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_capabilities(device: DeviceFacts) -> Capabilities:
    """Return what one device can run; the planner chooses from it.

    Called:
        Right after `mst_probe`, in the same process, once for each device of a usable probe;
        it has 5 seconds and must not import torch.

    Args:
        device: one of the devices that this backend's probe returned.

    Returns:
        A `Capabilities`. With nothing to report beyond the device's torch name and its
        collectives, leave the other fields at their defaults, which promise the least.

    If it raises:
        Or returns another type: the backend counts as found but not usable, for this reason.

    Example:
        ```python
        from mst.facts import Capabilities, DeviceFacts
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_capabilities(device: DeviceFacts) -> Capabilities:
            fused = device.arch == "mc1"
            return Capabilities(
                torch_device="mychip",
                distributed_backend="myccl",
                strategies=("single", "ddp"),
                attention=("sdpa", "eager") if fused else ("eager",),
                visible_devices_env="MYCHIP_VISIBLE_DEVICES",
            )
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_health(device: DeviceFacts) -> Sequence[str]:
    """Return problems of one device that its user should know of before a long job.

    Called:
        After `mst_probe`, in the same process, once for each device that was found, usable or
        not; it has 5 seconds and must not import torch.

    Args:
        device: one of the devices that this backend's probe returned.

    Returns:
        One sentence a problem: what is wrong and what to do. Empty when the device is well.

    If it raises:
        The failure itself is shown as a problem of the device; the device stays usable.

    Example:
        ```python
        from collections.abc import Sequence

        from mst.facts import DeviceFacts
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_health(device: DeviceFacts) -> Sequence[str]:
            free, total = device.memory_free_bytes, device.memory_total_bytes
            if free is not None and total is not None and free < total // 2:
                return [f"another process holds half of {device.name}: see `mychip-smi`"]
            return []
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
    """Return variables that a worker needs before its interpreter starts.

    Called:
        Once a job, in the process that plans it; the result is written into the plan, and the
        launcher sets it for every worker. It has 5 seconds and must not import torch.

    Args:
        devices: the devices of this backend that the job will use, at least one.

    Returns:
        Variable names to values, both text; they replace what the user's shell has set. An
        empty mapping when there is nothing to set. Where the capabilities name a
        `visible_devices_env`, it is among them and shows the worker exactly `devices`, which
        torch then counts from 0 in this order; an index in `devices` counts what the user's
        own setting of that variable left visible.

    If it raises:
        The job is not started, and the error names the backend and what happened.

    Example:
        ```python
        from collections.abc import Mapping, Sequence

        from mst.facts import DeviceFacts
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_environment(devices: Sequence[DeviceFacts]) -> Mapping[str, str]:
            visible = ",".join(str(device.index) for device in devices)
            return {"MYCHIP_VISIBLE_DEVICES": visible, "MYCHIP_LOG_LEVEL": "error"}
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_activate() -> None:
    """Make the torch device of this backend usable in this process.

    The one hook that may import torch, and the one place that loads the vendor's extension and
    registers its collectives with torch.distributed. Extensions of torch that it does not load
    are hidden from the worker.

    Called:
        Once in each worker, in its main thread, after the worker's environment is set and
        before any tensor is made. It has no time limit.

    Returns:
        Nothing. Leave the hook out when torch already drives the device by itself.

    If it raises:
        The worker stops before it loads the model, and the error names the backend.

    Example:
        ```python
        import importlib

        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_activate() -> None:
            # Importing the extension registers the device "mychip" with torch.
            importlib.import_module("torch_mychip")
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export_name() -> str:
    """Return the export target's short unique name, as users write it after `--to`.

    Called:
        Once, when plugins are loaded, in every process of `mst`.

    Returns:
        Lower-case letters, digits, "-" and "_", beginning with a letter. A target always has a
        name, so there is no way to report nothing.

    If it raises:
        The plugin is listed as failed by `mst plugins`; the others are loaded.

    Example:
        ```python
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export_name() -> str:
            return "myformat"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export(request: ExportRequest) -> ExportReport:
    """Write a finished run in this target's format and compare the result with its source.

    Called:
        By `mst export`, in its own process, once a command; it may import torch and has no
        time limit.

    Args:
        request: the run, the base model, the directory to write to and the target's options.

    Returns:
        An `ExportReport`. When no comparison can be made here, `checked` says so, as
        "not checked: " and why; it is never left empty.

    If it raises:
        An `mst.errors.MstError` is printed as it is: raise one for an option that is unknown.
        Any other error is shown as a fault of the plugin. The output directory is removed.

    Example:
        ```python
        import shutil
        from pathlib import Path

        from mst.export import ExportReport, ExportRequest
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export(request: ExportRequest) -> ExportReport:
            source = Path(request.run_dir, "adapter.safetensors")
            copy = Path(request.output_dir, "model.safetensors")
            shutil.copyfile(source, copy)
            same = source.read_bytes() == copy.read_bytes()
            return ExportReport(
                format="myformat",
                path=str(copy),
                files=(copy.name,),
                checked={"bytes": "equal" if same else "differ"},
            )
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_objective_name() -> str:
    """Return the objective's short unique name, as users write it after `--task`.

    Called:
        Once, when plugins are loaded, in every process of `mst`.

    Returns:
        Lower-case letters, digits, "-" and "_", beginning with a letter; the names of mst's own
        objectives are taken. An objective always has a name, so there is no way to report nothing.

    If it raises:
        The plugin is listed as failed by `mst plugins`; the others are loaded.

    Example:
        ```python
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_objective_name() -> str:
            return "confident"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_objective(request: TrainRequest) -> Objective:
    """Return what a model is trained for: its rows, its loss and its metrics.

    Called:
        When the request names this objective: once by the command that plans, where torch must
        not be imported, and once in each worker, before the data is read. It has no time limit.

    Args:
        request: what the user asked, every option of it; the ones of other objectives (`beta`,
            `loss_type` and so on) may be read.

    Returns:
        An `Objective`. Its functions are called in the worker; those on rows and examples by the
        planning command too. One that has nothing to measure beside its loss leaves
        `Part.metrics` empty.

    If it raises:
        An `mst.errors.MstError` is printed as it is: raise one for an option that can't be met.
        Any other error is shown as a fault of the plugin.

    Example:
        ```python
        from mst.hookspecs import hookimpl
        from mst.objective import Micro, Objective, Part, label_count
        from mst.request import TrainRequest


        def loss(micro: Micro) -> Part:
            # Cross-entropy that cares less for tokens which the model finds unlikely.
            found = -micro.policy.log_probs * micro.policy.log_probs.detach().exp()
            return Part(found.sum() / micro.totals["tokens"])


        @hookimpl
        def mst_objective(request: TrainRequest) -> Objective:
            return Objective(
                name="confident",
                lacks=lambda row: "" if row.messages else "has no answer: pass --task pt",
                counts=lambda example: {"tokens": label_count(example)},
                loss=loss,
            )
        ```

    Added in 0.1.0.
    """
