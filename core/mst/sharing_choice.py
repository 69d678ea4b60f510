"""Whether what rows begin with alike is computed once, and how much of a step that spares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.model.facts import ModelFacts
from mst.plan import Reason
from mst.request import TrainRequest
from mst.training.prefixes import LEAST_SHARED
from mst.workload import DataFacts

if TYPE_CHECKING:
    from mst.ranking import Candidate
    from mst.space import Space

# Architectures whose gradients were those of rows run alone within 1e-5 in float32 (transformers
# 5.23, torch 2.13). Others are asked too, but forecasts don't count on their answer.
VERIFIED = frozenset({
    "cohere", "cohere2", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt_neox", "granite",
    "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip


def sharing_obstacle(
    model: ModelFacts, data: DataFacts, request: TrainRequest, attention: str
) -> str:
    """Return why rows can't share their beginnings in any plan, or "".

    Args:
        model: its shape.
        data: the rows.
        request: the options.
        attention: transformers' implementation.
    """
    if data.objective.scores or data.images or request.padding_free == "off":
        return "the rows are padded, each in a line of its own"
    if request.dp_epsilon is not None:
        return "with --dp-epsilon each row's gradient is taken by itself"
    if data.packed_rows is not None:
        return "--packing fills blocks with whole rows"
    if attention != "sdpa":
        return f"{attention} attention takes no mask of its own for each row"
    if request.lora_dropout and request.tuner != "full":
        return "--lora-dropout would be drawn once for several rows"
    longest = data.max_length + data.objective.samples
    if model.window is not None and model.window < longest:
        return f"some layers see {model.window} tokens back, and rows have up to {longest}"
    return ""


def counted_on(model: ModelFacts, data: DataFacts, request: TrainRequest, attention: str) -> bool:
    """Return whether forecasts are made of what is computed once; arguments as above."""
    if request.prefix_sharing == "off" or data.beginnings is None or not data.beginnings.depths:
        return False
    return model.model_type in VERIFIED and not sharing_obstacle(model, data, request, attention)


def sharing(space: Space, chosen: Candidate) -> tuple[bool, Reason | None]:
    """Return whether rows share their beginnings in the chosen candidate, and why or why not."""
    data, made = space.data, chosen.configuration
    if space.request.prefix_sharing == "off" or data.beginnings is None:
        return False, None
    if not data.beginnings.depths:
        why = f"no two rows begin with the same {LEAST_SHARED} tokens"
        return False, Reason("prefix_sharing", "off", why)
    obstacle = sharing_obstacle(space.model, data, space.request, made.attention)
    if made.strategy == "zero3":
        obstacle = obstacle or "with zero3 DeepSpeed gathers the weights within each layer"
    if obstacle:
        return False, Reason("prefix_sharing", "off", obstacle)
    global_batch = made.micro_batch * made.accumulation * made.world_size
    spared = space.spared(made.micro_batch, global_batch)
    if not spared:
        why = "no rows that meet in a micro-batch begin alike for long enough"
        return False, Reason("prefix_sharing", "off", why)
    why = f"{spared:.0%} of a step's tokens are spared: rows of a micro-batch begin alike"
    if not space.shares:
        why += (
            f"; forecasts don't count on it, for it was not verified for {space.model.model_type}"
        )
    return True, Reason("prefix_sharing", "auto", why)
