"""Whether the decoder's layers are compiled: where it works, and saves more than it costs."""

from __future__ import annotations

from dataclasses import replace

from mst.candidates import memory_of
from mst.configuration import Configuration
from mst.errors import PlanError
from mst.memory_bounds import lacks
from mst.plan import Reason, TimeForecast
from mst.ranking import Candidate
from mst.space import Space

# Of a step, on a CPU alone: docs/time.md. SmolLM2-135M with LoRA in bfloat16, two AMX cores. On
# NF4 weights it saves as much (docs/qlora.md).
SPEEDUP = 1.25
# To compile one kind of layer where its kernels are not kept from an earlier run; then 6.
COMPILE_SECONDS = 35.0
# Architectures whose compiled gradients were those of the plain layers within 1e-4 in float32, of
# adapters, and of all weights with checkpointing (transformers 5.23, torch 2.13).
VERIFIED = frozenset({
    "bloom", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "gpt2",
    "gpt_bigcode", "gpt_neox", "gptj", "granite", "llama", "mistral", "mixtral", "mpt", "nemotron",
    "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2",
})  # fmt: skip


def compiling(space: Space, chosen: Candidate) -> tuple[bool, Reason | None]:
    """Return whether the chosen candidate's layers are compiled, and why or why not.

    Raises:
        PlanError: it was asked for, and can't be.
    """
    asked = space.request.torch_compile
    if asked == "off":
        return False, None
    obstacle = _obstacle(space, chosen)
    if asked == "on":
        if obstacle:
            raise PlanError(
                f"--torch-compile on was asked for: {obstacle}. Pass --torch-compile off."
            )
        return True, None
    saved = _saved(space, chosen)
    if not obstacle and space.model.model_type not in VERIFIED:
        obstacle = f"it was not verified for {space.model.model_type}; --torch-compile on tries it"
    if obstacle or saved is None:
        why = obstacle or "what it saves is measured on CPUs alone, without weights in 8 bits"
        return False, Reason("torch_compile", "off", why)
    # It must pay where the forecast is as far off as it may be.
    cost = _compile_seconds(chosen.configuration)
    factor = chosen.time.uncertainty if chosen.time else 1.0
    worth = saved >= factor * cost
    why = (
        f"it takes {cost:.0f} s once, and would save {saved:.0f} s of this run, within a factor of"
        f" {factor:g}"
    )
    if worth:
        compiled = replace(chosen.configuration, compiled=True)
        if short := lacks(space, memory_of(space, compiled), chosen.devices):
            return False, Reason("torch_compile", "off", f"compiled, the plan {short}")
    return worth, Reason("torch_compile", "on" if worth else "off", why)


def _obstacle(space: Space, chosen: Candidate) -> str:
    made = chosen.configuration
    if not space.capabilities.compiler:
        return (
            "torch finds no compiler for this device here (for a CPU: g++ and Python's headers,"
            " packages g++ and python3-dev)"
        )
    if made.attention.startswith("flash_attention"):
        return "FlashAttention is told the rows' lengths, and each would be compiled anew"
    if space.data.images:
        return "rows have images, and positions are the model's own"
    if space.model.model_type == "falcon":
        return "torch compiles wrong gradients for the one key that Falcon's heads share"
    if made.row_gradients:
        return "with --dp-epsilon each row's gradient is taken by itself"
    if made.strategy == "zero3":
        return "with zero3 DeepSpeed gathers the weights within each layer"
    return ""


def _saved(space: Space, chosen: Candidate) -> float | None:
    known = chosen.configuration.quantization in ("none", "nf4")
    if chosen.time is None or space.capabilities.torch_device != "cpu" or not known:
        return None
    return chosen.time.total_seconds * (1 - 1 / SPEEDUP)


def compiled_time(time: TimeForecast, steps: int, made: Configuration) -> TimeForecast:
    """Return the forecast of a run of `steps` steps through compiled layers."""
    step, once = time.step_seconds / SPEEDUP, _compile_seconds(made)
    return replace(time, step_seconds=step, total_seconds=step * steps + once)


def _compile_seconds(made: Configuration) -> float:
    # torch compiles a layer that is recomputed and one that isn't each by itself (2.13.0): two
    # graphs, and twice the time, of a small Llama.
    some = made.checkpointing and made.checkpointed_layers is not None
    return COMPILE_SECONDS * (2 if some else 1)
