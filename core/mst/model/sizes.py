"""A model's sizes from its configuration, under whichever names its architecture gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Names of one size in the configuration classes of transformers 5.23, the usual one first.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers",
               "num_decoder_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "decoder_hidden_size"),
    "attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads",
                        "decoder_attention_heads", "num_decoder_attention_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels", "dim_head", "attention_head_dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim",
                          "decoder_ffn_dim", "d_ff", "dim_ff", "dff"),
    "vocab_size": ("vocab_size", "n_words"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx",
                                "max_seq_len", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts",
                "num_moe_experts", "num_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k",
                          "top_k_experts", "moe_k", "num_selected_experts", "moe_router_topk"),
}  # fmt: skip
# Multimodal configurations keep the language model's sizes one level down.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
# Beyond any model there is: a damaged number must not make a process that never ends.
_AT_MOST = {
    "layers": 4096, "hidden_size": 2**20, "vocab_size": 2**26, "attention_heads": 2**14,
    "experts": 2**16, "intermediate_size": 2**24, "head_dim": 2**16, "key_value_heads": 2**14,
    "max_position_embeddings": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What `ModelFacts` calls by the same names; 0 where the configuration doesn't say."""

    layers: int
    hidden_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int | None
    experts: int
    experts_per_token: int


def read_sizes(get: Callable[[str], Any]) -> Sizes:
    """Return the sizes that a configuration gives.

    Args:
        get: returns an attribute of the language model's configuration, or None.
    """
    found = {key: _first(get, names) for key, names in _NAMES.items()}
    hidden, heads = found["hidden_size"] or 0, found["attention_heads"] or 1
    return Sizes(
        layers=found["layers"] or 0,
        hidden_size=hidden,
        attention_heads=heads,
        key_value_heads=found["key_value_heads"] or heads,
        head_dim=found["head_dim"] or hidden // heads,
        intermediate_size=found["intermediate_size"] or 0,
        vocab_size=found["vocab_size"] or 0,
        max_position_embeddings=found["max_position_embeddings"],
        experts=found["experts"] or 0,
        experts_per_token=found["experts_per_token"] or 0,
    )


def _first(get: Callable[[str], Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = get(name)
        if isinstance(value, list) and value and all(_is_count(each) for each in value):
            value = max(value)  # a size of its own for each layer
        if _is_count(value):
            count: int = value
            return count
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model."""
    for name in TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, dict) and part:
            return text_part(part)
    return config


def impossible_size(config: Mapping[str, Any]) -> str:
    """Return what in a config.json can be no model's size, as "name is value"; "" for nothing."""
    for part in (config, text_part(config)):
        for key, at_most in _AT_MOST.items():
            # Encoders and dense models may say 0 experts or no heads of their own.
            at_least = 1 if key in ("hidden_size", "vocab_size", "layers") else 0
            for name in _NAMES[key]:
                value = part.get(name)
                if isinstance(value, float) or (
                    _is_count(value) and not at_least <= value <= at_most  # type: ignore[operator]
                ):
                    return f"{name} is {value}"
    return _too_large(config)


def _too_large(config: Mapping[str, Any]) -> str:
    """Return a size beyond any model's in the parts for images and sound."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        waiting += [each for each in part.values() if isinstance(each, dict)]
        for key, at_most in _AT_MOST.items():
            for name in _NAMES[key]:
                value = part.get(name)
                if _is_count(value) and value > at_most:  # type: ignore[operator]
                    return f"{name} is {value}"
    return ""
