"""The serving engine `lmdeploy`: TurboMind on CUDA, LMDeploy's pytorch engine on Ascend.

Source of the rules: lmdeploy 0.18.0, `lmdeploy/cli/serve.py` and `cli/utils.py` (options),
`serve/openai/api_server.py`, `serve/openai/endpoints/management.py` (health) and
`turbomind/supported_models.py`. Written after these files; it has not been run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mst.hookspecs import hookimpl
from mst.serve.engines import (
    EngineCommand,
    EngineEnvironment,
    EngineFacts,
    EngineStart,
    ModelToServe,
    Serves,
)
from mst.serve.engines.environment import pinned_environment, venv_command
from mst_plugins import turbomind

_HERE = Path(__file__).parent
_REQUIREMENTS = {
    "cuda": _HERE / "lmdeploy-requirements.txt",
    "ascend": _HERE / "lmdeploy-ascend-requirements.txt",
}
# Of those of `SUPPORTED_ARCHS` in turbomind/supported_models.py, the dense text models.
_TURBOMIND = tuple(sorted(turbomind.ARCHITECTURES))
# docs/en/supported_models/supported_models.md of LMDeploy, "PyTorchEngine on Huawei Ascend".
_ASCEND = (
    "InternLM2ForCausalLM", "InternLM3ForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM",
    "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip


@hookimpl
def mst_engine_name() -> str:
    """Return "lmdeploy"."""
    return "lmdeploy"


@hookimpl
def mst_engine_facts() -> EngineFacts:
    """Return what TurboMind loads on CUDA, and the pytorch engine on Ascend."""
    return EngineFacts(
        serves=(
            Serves(
                ("merged", "awq", "gptq", "compressed-tensors"),
                ("cuda",),
                _TURBOMIND,
                "lmdeploy 0.18.0, lmdeploy/turbomind/supported_models.py and converter.py",
            ),
            Serves(
                ("merged",),
                ("ascend",),
                _ASCEND,
                "LMDeploy, docs/en/supported_models/supported_models.md",
            ),
        ),
        listens=("port",),
        features=("chat", "completions", "json_schema", "logprobs"),
        made_for=("turbomind",),
    )


@hookimpl
def mst_engine_fault(model: ModelToServe, backend: str) -> str:
    """Return which demand of TurboMind's a quantized model breaks, or ""."""
    if model.template is not None:
        return (
            "its chat templates are its own, so that it can't follow the run's --template. Write"
            " the template into the model (mst merge), and serve that"
        )
    if backend == "cuda" and model.format in turbomind.GROUP_SIZES:
        fault = turbomind.config_fault(Path(model.directory))
        if fault:
            return f"TurboMind loads no such weights: {fault}. Export it with --format turbomind"
    return ""


@hookimpl
def mst_engine_environment(directory: str, backend: str) -> EngineEnvironment:
    """Return which LMDeploy is there, and the command for this backend."""
    found = pinned_environment(directory, "LMDeploy", _REQUIREMENTS["cuda"], "lmdeploy")
    if backend != "ascend":
        return found
    command = venv_command(directory, _REQUIREMENTS["ascend"])
    # setup.py of LMDeploy: without it, CUDA's libraries are required and TurboMind is built.
    return replace(found, command=f"export LMDEPLOY_TARGET_DEVICE=ascend && {command}")


@hookimpl
def mst_engine_command(start: EngineStart) -> EngineCommand:
    """Return the command line of `lmdeploy serve api_server`."""
    engine: tuple[str, ...] = ("--backend", "turbomind")
    if start.backend == "ascend":
        engine = ("--backend", "pytorch", "--device", "ascend")
    arguments = (
        f"{start.environment_dir}/bin/lmdeploy", "serve", "api_server", start.model.directory,
        "--server-name", "127.0.0.1",
        "--server-port", str(start.port),
        "--model-name", start.served_name,
        *engine,
        "--dtype", start.dtype if start.dtype in ("bfloat16", "float16") else "auto",
        "--session-len", str(start.context),
        "--max-batch-size", str(start.batch),
        # Sampling is the caller's, or this server's default; not that of generation_config.json,
        # whose tokens that end an answer are read all the same.
        "--generation-config", "lmdeploy",
        # It logs prompts at INFO, and these options keep it from that twice.
        "--log-level", "ERROR",
        "--max-log-len", "0",
        "--disable-fastapi-docs",
    )  # fmt: skip
    environment = {"UVICORN_LOG_LEVEL": "critical", "TM_LOG_LEVEL": "ERROR"}
    if start.backend == "ascend":
        # The extension torch_npu is what the engine computes with.
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    return EngineCommand(arguments, environment)
