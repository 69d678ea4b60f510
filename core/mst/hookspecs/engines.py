"""Hooks of a serving engine."""

# A hook specification is its signature and its docstring; it is never called.
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.hookspecs.markers import hookspec

if TYPE_CHECKING:
    from mst.serve.engines import (
        EngineCommand,
        EngineEnvironment,
        EngineFacts,
        EngineStart,
        ModelToServe,
    )


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
