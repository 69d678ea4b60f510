"""A serving engine that mst does not have: what a package looks like that adds one."""

import sys
from pathlib import Path

from mst.hookspecs import hookimpl
from mst.serve.engines import EngineCommand, EngineEnvironment, EngineFacts, EngineStart, Serves

SERVER = Path(__file__).with_name("parrot_server.py")


@hookimpl
def mst_engine_name() -> str:
    return "parrot"


@hookimpl
def mst_engine_facts() -> EngineFacts:
    return EngineFacts(
        serves=(Serves(("merged", "awq"), ("cpu",), source="parrot_server.py reads no weights"),),
        listens=("unix", "port"),
        features=("chat", "completions"),
        made_for=("awq",),
    )


@hookimpl
def mst_engine_environment(directory: str, backend: str) -> EngineEnvironment:
    # It needs nothing but Python, so it is wherever this module is.
    version = "0.4.0" if SERVER.is_file() else ""
    return EngineEnvironment("python -m pip install mst-parrot", version)


@hookimpl
def mst_engine_command(start: EngineStart) -> EngineCommand:
    where = start.socket or str(start.port)
    return EngineCommand(
        (sys.executable, str(SERVER), start.model.directory, where, start.served_name),
        {"PARROT_NOTES": start.cache_dir},
    )
