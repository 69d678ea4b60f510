"""The vendor's manual: every hook of backends, export targets, objectives and serving engines.

A plugin is a module (or object) named by an entry point in group `mst`:

    [project.entry-points.mst]
    mychip = "mst_mychip.backend"

A backend must have `mst_backend_name`, `mst_probe` and `mst_capabilities`; an export target must
have `mst_export_name`, `mst_export_check`, `mst_export` and `mst_export_weights`; an objective must
have `mst_objective_name` and `mst_objective`; an engine must have `mst_engine_name`,
`mst_engine_facts`, `mst_engine_environment` and `mst_engine_command`; the other hooks may be left
out. Each hook is called on one plugin at a time, never on all of them, so a plugin that fails takes
no other with it. A hook may leave out arguments that it does not need. A hook that is unknown to
the installed mst is refused as a misspelling, unless it is marked `hookimpl(optionalhook=True)`.
Each example below is run by the tests.
"""

# A hook specification is its signature and its docstring; it is never called.
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

from mst.facts import Capabilities, DeviceFacts, Probe, Telemetry

if TYPE_CHECKING:
    import torch

    from mst.export import ExportPlan, ExportReport, ExportRequest
    from mst.objective import Objective
    from mst.request import TrainRequest
    from mst.serve.engines import (
        EngineCommand,
        EngineEnvironment,
        EngineFacts,
        EngineStart,
        ModelToServe,
    )

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
def mst_telemetry(device: DeviceFacts) -> Telemetry:
    """Return the energy that one device has consumed, its heat, and what slows it down.

    Called:
        By `mst bench`, in its own process, about once a second while another process works on the
        device; it has 5 seconds, should take less than 0.1, and must not import torch.

    Args:
        device: one of the devices that this backend's probe returned.

    Returns:
        A `Telemetry`: a counter of joules where the device has one, else the watts that it draws,
        which are added up over time. With nothing to report: `Telemetry(reason="why")`.

    If it raises:
        Or is late: energy and heat of the measurement are unknown, for this reason.

    Example:
        ```python
        from pathlib import Path

        from mst.facts import DeviceFacts, Telemetry
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_telemetry(device: DeviceFacts) -> Telemetry:
            file = Path(f"/sys/class/mychip/mychip{device.index}/energy_uj")
            if not file.exists():
                return Telemetry(reason=f"{file} is not there: it needs driver 2.1")
            return Telemetry(energy_joules=int(file.read_text()) / 1e6)
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
    """Return the export target's short unique name, as users write it after `--format`.

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
def mst_export_check(request: ExportRequest) -> ExportPlan:
    """Return what an export would do and how it will be judged, before any hour is spent.

    Called:
        By `mst export` before anything is merged, in its own process, without torch. `model_dir` is
        a directory of the same config and the same shapes as the merged model.

    Args:
        request: bits, group size, method and options as the user gave them; None and "auto" are
            yours to choose.

    Returns:
        An `ExportPlan`. There is always one: what can't be done raises.

    If it raises:
        An `mst.errors.MstError` is printed as it is: raise one where architecture, widths, bits,
        group size or a library stand in the way, and say what would do. Any other error is shown
        as a fault of the plugin.

    Example:
        ```python
        from pathlib import Path

        from mst.errors import PlanError
        from mst.export import Bounds, ExportPlan, ExportRequest
        from mst.hookspecs import hookimpl
        from mst.model.facts import read_facts


        @hookimpl
        def mst_export_check(request: ExportRequest) -> ExportPlan:
            if request.bits not in (None, 32):
                raise PlanError(f"--bits {request.bits}: myformat has float32 only. Leave it out.")
            size = 4 * read_facts(Path(request.model_dir)).parameters
            same = Bounds(perplexity_ratio=1.01, mean_kl=0.01, agreement=0.95)
            return ExportPlan("float32", same, disk_bytes=size, memory_bytes=size)
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export(request: ExportRequest) -> ExportReport:
    """Write a merged model in this target's format.

    Called:
        By `mst export`, in a worker process inside the jail, after `mst_export_check`; it may
        import torch and has no time limit. After a kill it is called again with the same
        `work_dir` and may go on from what it left there.

    Args:
        request: the merged model, the directory to write to, rows to calibrate by, and options.

    Returns:
        An `ExportReport`. Tokenizer, template, generation_config.json and config.json must lie in
        the directory too, as transformers loads them; mst adds manifest and README.

    If it raises:
        An `mst.errors.MstError` is printed as it is: it must quote no row. A full disk is told as
        that. Any other error is shown as a fault of the plugin by its type and place, for its text
        may quote a row. The output directory is removed.

    Example:
        ```python
        import shutil
        from pathlib import Path

        from mst.export import ExportReport, ExportRequest
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export(request: ExportRequest) -> ExportReport:
            for each in Path(request.model_dir).iterdir():
                if each.name not in ("manifest.json", "merge.json", "README.md"):
                    shutil.copyfile(each, Path(request.output_dir, each.name))
            files = sorted(each.name for each in Path(request.output_dir).iterdir())
            return ExportReport("myformat", tuple(files))
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export_weights(directory: str) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield what a written artefact computes with, to be compared with what was trained.

    Called:
        By `mst export` in its worker, after `mst_export`.

    Args:
        directory: that `mst_export` has filled.

    Returns:
        Name and value of each weight of the model, as transformers' modules name them (files may
        have other names: `mst.export.loaded.loaded_weights`), in their shapes, any float dtype:
        packed ones unpacked from the files. A head that is tied to the embedding may be left out.
        Yield them one by one, for one at a time is held.

    If it raises:
        The artefact can't be compared, so there is none.

    Example:
        ```python
        from collections.abc import Iterator
        from pathlib import Path
        from typing import Any

        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export_weights(directory: str) -> Iterator[tuple[str, Any]]:
            from safetensors import safe_open

            for path in sorted(Path(directory).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    yield from ((name, file.get_tensor(name)) for name in file.keys())
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export_rounded(request: ExportRequest) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the weights that plain rounding to the same scheme would give, unpacked.

    Called:
        By `mst export` in its worker where the plan's bounds have `beats_rounding`: a method that
        takes minutes must be better than one that takes none. Where memory allows, in a thread of
        its own while `mst_export` runs.

    Args:
        request: as `mst_export` got it, without the directories to write to.

    Returns:
        As `mst_export_weights`.

    If it raises:
        The artefact can't be compared, so there is none.

    Example:
        ```python
        from collections.abc import Iterator
        from pathlib import Path
        from typing import Any

        from mst.export import ExportRequest
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export_rounded(request: ExportRequest) -> Iterator[tuple[str, Any]]:
            from safetensors import safe_open

            for path in sorted(Path(request.model_dir).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        yield name, (file.get_tensor(name) * 8).round() / 8
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


@hookspec(firstresult=True)
def mst_engine_name() -> str:
    """Return the serving engine's short unique name, as users write it after `--engine`.

    Called:
        Once, when plugins are loaded, in every process of `mst`.

    Returns:
        Lower-case letters, digits, "-" and "_", beginning with a letter; "auto" and "builtin" are
        taken. An engine always has a name, so there is no way to report nothing.

    If it raises:
        The plugin is listed as failed by `mst plugins`; the others are loaded.

    Example:
        ```python
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_engine_name() -> str:
            return "myengine"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_engine_facts() -> EngineFacts:
    """Return which weights the engine computes with, on which devices, and what it can do.

    Called:
        By `mst serve`, in its own process inside the jail, before anything is loaded; it has 5
        seconds and must not import torch.

    Returns:
        An `EngineFacts`, the same whether the engine is installed or not. An engine that serves
        nothing has no `serves`.

    If it raises:
        Or returns another type: the engine is left out, and an error that lists engines says why.

    Example:
        ```python
        from mst.hookspecs import hookimpl
        from mst.serve.engines import EngineFacts, Serves


        @hookimpl
        def mst_engine_facts() -> EngineFacts:
            source = "MyEngine 2.1 manual, page 12"
            return EngineFacts(
                serves=(
                    Serves(("merged", "awq"), ("mychip",), ("LlamaForCausalLM",), source),
                    Serves(("gptq",), ("cpu", "mychip"), source=source),
                ),
                features=("chat", "completions", "logprobs"),
            )
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_engine_fault(model: ModelToServe, backend: str) -> str:
    """Return why the engine can't serve one model, beyond what its facts tell.

    Called:
        By `mst serve`, right after `mst_engine_facts`, in the same process, whatever the model is;
        it has 5 seconds and must not import torch.

    Args:
        model: its directory may be read; of a format that the engine does not load, there is
            nothing to say.
        backend: name of the device's backend.

    Returns:
        What stands in the way and what would do, as the rest of a sentence; "" when nothing does,
        as when the hook is left out.

    If it raises:
        Or returns another type: the engine is left out, and an error that lists engines says why.

    Example:
        ```python
        import json
        from pathlib import Path

        from mst.hookspecs import hookimpl
        from mst.serve.engines import ModelToServe


        @hookimpl
        def mst_engine_fault(model: ModelToServe, backend: str) -> str:
            if model.format != "gptq":
                return ""
            config = json.loads(Path(model.directory, "config.json").read_text())
            size = config["quantization_config"]["group_size"]
            return "" if size == 128 else f"its kernels are for groups of 128, these are of {size}"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_engine_environment(directory: str, backend: str) -> EngineEnvironment:
    """Return which version of the engine is installed, and the one command that installs it.

    Called:
        By `mst serve`, right after `mst_engine_facts`, in the same process; it has 5 seconds, and
        looks at files alone.

    Args:
        directory: where mst expects the environment, or where `--engine-dir` says that it lies.
        backend: name of the device's backend: an engine may have a build for each.

    Returns:
        An `EngineEnvironment`. Where nothing is installed its version is "", and the command is
        what the user types: mst has no network. `mst.serve.engines.environment` has what a virtual
        environment needs.

    If it raises:
        Or returns another type: the engine is left out, and an error that lists engines says why.

    Example:
        ```python
        from mst.hookspecs import hookimpl
        from mst.serve.engines import EngineEnvironment
        from mst.serve.engines.environment import installed_version


        @hookimpl
        def mst_engine_environment(directory: str, backend: str) -> EngineEnvironment:
            python = f"{directory}/bin/python"
            return EngineEnvironment(
                command=f"python3 -m venv {directory} && {python} -m pip install myengine==2.1",
                version=installed_version(directory, "myengine"),
            )
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_engine_command(start: EngineStart) -> EngineCommand:
    """Return how the engine is started, so that it answers OpenAI's API to mst alone.

    Called:
        Once a server, in its worker inside the jail; what it returns is used again whenever the
        engine has to be started again. It has 5 seconds and must not import torch.

    Args:
        start: the model, and where to listen: `socket` or `port`, as the facts have it.

    Returns:
        An `EngineCommand`. The program stays in the foreground, answers its health path with 200
        once it takes requests, serves the model under `served_name`, ends on SIGTERM, and has its
        logging of requests switched off. There is always one.

    If it raises:
        An `mst.errors.MstError` is printed as it is. After any other error, or another type, the
        server ends and names the engine.

    Example:
        ```python
        from mst.hookspecs import hookimpl
        from mst.serve.engines import EngineCommand, EngineStart


        @hookimpl
        def mst_engine_command(start: EngineStart) -> EngineCommand:
            program = f"{start.environment_dir}/bin/myengine"
            options = {"--uds": start.socket, "--name": start.served_name, "--log": "none"}
            pairs = [str(each) for pair in options.items() for each in pair]
            return EngineCommand(
                (program, start.model.directory, *pairs), {"MYENGINE_THREADS": str(start.threads)}
            )
        ```

    Added in 0.1.0.
    """
