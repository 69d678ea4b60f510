"""What an engine beside the built-in one tells, and what it is started with: types only.

The work is done by plugins that implement the `mst_engine…` hooks (see `mst.hookspecs`). mst
chooses an engine, starts it in the jail, keeps it running, and hands on requests that it has
checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What an engine may be able to do beside answering; a request that wants what it can't is refused.
# "penalties" are `presence_penalty`, `frequency_penalty` and `logit_bias`; "prompt_logprobs" are
# those of `echo` with `logprobs`.
FEATURES = (
    "chat", "completions", "embeddings", "json_schema", "tools", "logprobs", "prompt_logprobs",
    "penalties",
)  # fmt: skip


@dataclass(frozen=True)
class Serves:
    """Weights that an engine computes with: each of the formats on each of the backends.

    Attributes:
        formats: "merged" for whole weights in 16 or 32 bits, as `mst merge` and `--format merged`
            write them, else the `quant_method` of config.json: "awq", "gptq", "compressed-tensors".
            The built-in engine has "run" and "gguf" too.
        backends: names of backends, as after `--device`; empty for all.
        architectures: as `architectures` of config.json names them; empty where the engine is
            asked when it loads the model.
        source: where this is told: a page, or a file of the engine with its version.
    """

    formats: tuple[str, ...]
    backends: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class EngineFacts:
    """What an engine can do, wherever it is installed.

    Attributes:
        serves: what it loads.
        listens: "unix" when it can listen on a unix socket, "port" when on a port of 127.0.0.1.
            A port is given only where no other program of this machine reaches it.
        features: of `FEATURES`.
        made_for: formats of `mst export` that are written for this engine before all others.
    """

    serves: tuple[Serves, ...]
    listens: tuple[str, ...] = ("unix",)
    features: tuple[str, ...] = ("chat", "completions")
    made_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineEnvironment:
    """Where an engine is installed.

    Attributes:
        command: the one command line that makes it, for the user to type: mst has no network.
        version: of the engine that is there; "" when there is none.
        reason: why there is none, or what the user should know of the one that is there.
    """

    command: str
    version: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ModelToServe:
    """The model as an engine gets it.

    Attributes:
        directory: with config.json, weights, tokenizer and template; absolute. Of "run" the run's.
        format: of `Serves.formats`.
        architecture: the first of config.json's `architectures`; "" where there is none.
        exported_as: format of the `mst export` that wrote it; "" when it is no artefact.
        template: jinja file that takes the place of the model's own template; None for none.
    """

    directory: str
    format: str
    architecture: str = ""
    exported_as: str = ""
    template: str | None = None


@dataclass(frozen=True)
class EngineStart:
    """What an engine is started with. `socket` or `port` is set, as `EngineFacts.listens` has it.

    Attributes:
        model: to load.
        served_name: by which requests will call it.
        backend: name of the device's backend.
        dtype: torch name of the dtype to compute with.
        context: most tokens of a prompt and its answer together.
        batch: most answers at once.
        threads: CPU threads.
        environment_dir: where `mst_engine_environment` has found it.
        cache_dir: a directory of its own for what it compiles.
        socket: path of the unix socket to listen on.
        port: of 127.0.0.1, to listen on.
    """

    model: ModelToServe
    served_name: str
    backend: str
    dtype: str
    context: int
    batch: int
    threads: int
    environment_dir: str
    cache_dir: str = ""
    socket: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class EngineCommand:
    """How an engine is started.

    Attributes:
        arguments: program and arguments; it stays in the foreground, and must log no request.
        environment: variables beside the user's, of which those with secrets and Python's own are
            left out, and those that keep libraries offline.
        health: path that answers 200 once, and as long as, it takes requests.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = "/health"
