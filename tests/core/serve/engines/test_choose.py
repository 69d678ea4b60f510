"""The choice of an engine, on machines told by their facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mst.errors import PlanError, UsageError
from mst.seal.jail.seal import BROKER, GIVEN, OFF, ROOT, SECCOMP, USER, Seal
from mst.serve.engines import EngineEnvironment, EngineFacts, ModelToServe, Serves
from mst.serve.engines.choose import FoundEngine, choose_engine
from mst.serve.engines.plan import places_of
from mst_plugins import lmdeploy_engine, vllm_engine

QUANTIZED = ("awq", "gptq", "compressed-tensors")
MERGED = ModelToServe("/models/qwen", "merged", "Qwen2ForCausalLM")


def found(module: object, here: bool = True, fault: str = "") -> FoundEngine:
    """Return a built-in plugin's engine as a machine has it, or has it not."""
    name = module.mst_engine_name()  # type: ignore[attr-defined]
    environment = EngineEnvironment(f"make {name}", "1.0" if here else "", "")
    return FoundEngine(name, module.mst_engine_facts(), environment, fault)  # type: ignore[attr-defined]


BOTH = (found(lmdeploy_engine), found(vllm_engine))
NONE = (found(lmdeploy_engine, here=False), found(vllm_engine, here=False))


def chosen(model: ModelToServe, backend: str, engines: tuple[FoundEngine, ...] = BOTH) -> str:
    return choose_engine(model, backend, engines).engine


@pytest.mark.parametrize("layout", ["merged", "run", "gguf"])
@pytest.mark.parametrize("engines", [BOTH, NONE])
def test_a_cpu_gets_the_builtin_engine_for_what_it_loads(
    layout: str, engines: tuple[FoundEngine, ...]
) -> None:
    assert chosen(replace(MERGED, format=layout), "cpu", engines) == "builtin"


@pytest.mark.parametrize("layout", QUANTIZED)
def test_quantized_weights_go_to_an_engine_with_kernels_for_them(layout: str) -> None:
    model = replace(MERGED, format=layout, exported_as=layout)

    assert chosen(model, "cuda") == "vllm"
    assert chosen(model, "cpu") == "vllm"
    assert chosen(replace(model, exported_as="turbomind"), "cuda") == "lmdeploy"


def test_a_chip_gets_an_engine_that_was_installed_for_it() -> None:
    only_vllm = (found(lmdeploy_engine, here=False), found(vllm_engine))

    assert chosen(MERGED, "cuda", only_vllm) == "vllm"
    assert chosen(MERGED, "cuda", NONE) == "builtin"
    assert chosen(MERGED, "ascend") == "lmdeploy"
    assert chosen(replace(MERGED, format="run"), "cuda") == "builtin"
    assert chosen(MERGED, "mychip") == "builtin"


def test_adapters_are_served_by_the_builtin_engine() -> None:
    assert choose_engine(MERGED, "cuda", BOTH, adapters=True).engine == "builtin"
    with pytest.raises(PlanError, match=r"adapters .* built-in engine alone"):
        choose_engine(MERGED, "cuda", BOTH, "vllm", adapters=True)


def test_the_reason_names_what_else_would_do() -> None:
    model = replace(MERGED, format="awq", exported_as="awq")

    reason = choose_engine(model, "cuda", BOTH).reason

    assert (reason.choice, reason.value) == ("engine", "vllm")
    assert reason.why == "awq is written for it; --engine lmdeploy would serve it too"


def test_weights_that_no_engine_loads_are_refused_with_each_ones_reason() -> None:
    model = replace(MERGED, format="fp8")

    with pytest.raises(PlanError) as caught:
        choose_engine(model, "cpu", NONE)

    text = str(caught.value)
    assert "no engine here serves /models/qwen (fp8) on cpu" in text
    assert "builtin: it loads weights in the format merged or run or gguf, and these are" in text
    assert "vllm: it loads weights" in text
    assert "merged or gguf" in text


def test_a_missing_environment_is_refused_with_the_command_that_makes_it() -> None:
    model = replace(MERGED, format="awq")

    with pytest.raises(PlanError, match=r"(?s)vllm: its environment is not here.*\n    make vllm"):
        choose_engine(model, "cpu", NONE)
    with pytest.raises(PlanError, match=r"(?s)--engine vllm can't serve .*\n    make vllm"):
        choose_engine(MERGED, "cpu", NONE, "vllm")


def test_a_wish_that_cannot_be_met_names_what_would() -> None:
    with pytest.raises(PlanError, match=r"(?s)on cuda or ascend, not on cpu.*builtin or vllm"):
        choose_engine(MERGED, "cpu", BOTH, "lmdeploy")
    with pytest.raises(PlanError, match=r"(?s)builtin can't serve.*--engine lmdeploy or vllm"):
        choose_engine(replace(MERGED, format="awq"), "cuda", BOTH, "builtin")
    falcon = replace(MERGED, architecture="FalconForCausalLM")
    with pytest.raises(PlanError, match=r"(?s)it knows .*Llama.*and this is FalconForCausalLM"):
        choose_engine(falcon, "cuda", BOTH, "lmdeploy")
    with pytest.raises(UsageError, match="there is: auto, builtin, lmdeploy, vllm"):
        choose_engine(MERGED, "cpu", BOTH, "vlm")


def test_a_plugins_own_reason_counts_and_a_failed_plugin_is_left_out() -> None:
    awq = replace(MERGED, format="awq", exported_as="awq")
    odd = (found(vllm_engine, fault="its kernels want groups of 128"), found(lmdeploy_engine))
    broken = (FoundEngine("vllm", fault="its plugin failed: KeyError: 'x'"), found(lmdeploy_engine))

    assert chosen(awq, "cuda", odd) == "lmdeploy"
    assert chosen(awq, "cuda", broken) == "lmdeploy"
    with pytest.raises(PlanError, match=r"its plugin failed: KeyError"):
        choose_engine(awq, "cuda", broken, "vllm")


def test_an_engine_that_wants_a_port_is_not_opened_to_the_machines_other_users() -> None:
    port = found(lmdeploy_engine)

    assert choose_engine(MERGED, "cuda", (port,), places=("unix", "port")).engine == "lmdeploy"
    with pytest.raises(PlanError, match=r"listens on a port, and in this jail only a unix"):
        choose_engine(MERGED, "cuda", (port,), "lmdeploy", places=("unix",))
    with pytest.raises(PlanError, match="this jail has none"):
        choose_engine(MERGED, "cuda", BOTH, "vllm", places=())


@pytest.mark.parametrize(
    ("layer", "unix", "places"),
    [
        (ROOT, "broker", ("unix", "port")),
        (USER, "broker", ("unix", "port")),
        (USER, "none", ("port",)),
        (GIVEN, "broker", ("unix",)),
        (BROKER, "broker", ("unix",)),
        (SECCOMP, "none", ()),
        (OFF, "none", ("unix",)),
    ],
)
def test_a_port_is_safe_where_loopback_is_the_jails_own(
    layer: str, unix: str, places: tuple[str, ...]
) -> None:
    assert places_of(Seal(layer, unix=unix)) == places


def test_facts_without_a_backend_or_an_architecture_hold_for_all() -> None:
    facts = EngineFacts((Serves(("merged",)),))
    engine = FoundEngine("any", facts, EngineEnvironment("make any", "1.0"))

    assert chosen(replace(MERGED, architecture=""), "mychip", (engine,)) == "any"
