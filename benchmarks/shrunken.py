"""A small random configuration of any architecture of transformers: the real layout, little sizes.

The rules go by the names of a configuration's attributes. What they get wrong for one architecture
stands in EXCEPTIONS, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCAB = 128
# Token ids below this are text; those of images and other marks are moved to the vocabulary's end.
TEXT_IDS = 96


@dataclass(frozen=True)
class Scale:
    """The sizes of a shrunken model; two of them tell a rule from a coincidence."""

    layers: int = 2
    width: int = 64
    inner: int = 96
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 16
    experts: int = 4


FIRST = Scale()
SECOND = Scale(layers=3, width=96, inner=160, heads=6, key_value_heads=3, head_dim=16, experts=6)

_LAYERS = re.compile(
    r"(num_|n_|.*_)?(hidden_|encoder_|decoder_|transformer_)?layers?|depth|.*_depth|num_blocks"
)
_KEEP_LAYERS = re.compile(r".*(nextn|mtp|shared|dense|hash|kv_shared|interval|per_layer|norm).*")
_WIDTH = re.compile(
    r"hidden_size|d_model|n_embd|n_embed|dim|emb_dim|embed_dim|embedding_size|.*_hidden_size"
    r"|hidden_dim|.*_hidden_dim|projection_dim|word_embed_proj_dim|.*embed_dim|lru_width"
    r"|projector_dim|output_dim|out_dim|attention_hidden_size|.*projection_size"
)
_INNER = re.compile(
    r".*intermediate_size.*|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size|dim_ff|dff|mlp_dim"
    r"|.*intermediate_dim|expert_dim|shared_expert_size"
)
_KV = re.compile(r".*(key_value_heads|kv_heads|num_kv_head|multi_query_group_num)")
_HEADS = re.compile(r".*attention_heads|n_heads?|num_heads|.*num_heads|.*_n_heads")
_HEAD_DIM = re.compile(
    r".*head_dim|dim_head|kv_channels|.*_head_size|d_kv|v_head_dim|head_size|d_head|.*rotary_dim"
)
_RANK = re.compile(r".*lora_rank|.*low_rank_dim|.*_rank")
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_|moe_)?experts|num_moe_experts")
_TOP_K = re.compile(
    r".*experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|num_selected_experts|moe_router_topk"
)
_POSITIONS = re.compile(
    r"(max_|original_max_|n_)?position(_embedding)?s|max_position_embeddings|n_positions|n_ctx"
    r"|max_seq_len|seq_length|max_source_positions|max_target_positions|.*_max_position_embeddings"
)
_VOCAB = re.compile(r".*vocab_size|n_words|vocab_size_per_layer_input|n_token")
_TOKEN = re.compile(r".*token_(id|index)|.*_token_idx?|.*token_ids?|(pad|bos|eos|mask|unk)_index")

_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "split_ngram_parts": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "hc_lowrank": 16,
}  # fmt: skip


def _zamba(other: str) -> dict[str, Any]:
    return {
        "num_hidden_layers": 4,
        "layers_block_type": [other, "hybrid", other, "hybrid"],
        "attention_hidden_size": "absent",
        "attention_head_dim": lambda s: 2 * s.width // s.heads,
    }


# Attributes of a model_type, or of a part of it ("type.part"), that the rules can't guess.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # heads x their width must be what Mamba's expansion makes of the width
    "bamba": {"mamba_n_heads": lambda s: s.width // 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "falcon_h1": {"mamba_d_ssm": lambda s: 2 * s.width, "mamba_n_heads": lambda s: s.width // 8,
                  "mamba_d_head": 16, "mamba_d_state": 8},
    "granitemoehybrid": {"mamba_n_heads": lambda s: s.width // 8, "mamba_d_head": 16,
                         "mamba_d_state": 8, "layer_types": lambda s: ["mamba"] * (s.layers - 1)
                         + ["attention"]},
    "mamba2": {"num_heads": lambda s: s.width // 8, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    # its positions are a grid whose sides are as wide together as the model
    "reformer": {"axial_pos_embds": False, "num_hashes": 1},
    # the class asks which language's adapters to use; the hub's files don't say
    "xmod": {"default_language": "en_XX"},
    # half a million rows that are hashed into, for each of several lengths; its parts name the
    # width of another part
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt.encoder_config": {"hidden_size_global": lambda s: s.width},
    "blt.decoder_config": {"hidden_size_global": lambda s: s.width},
    # the class has no default that it could be built from
    "ministral": {"head_dim": lambda s: s.head_dim},
    "hunyuan_v1_dense": {"head_dim": lambda s: s.head_dim},
    "hunyuan_v1_moe": {"head_dim": lambda s: s.head_dim},
    "nemotron": {"num_key_value_heads": lambda s: s.key_value_heads},
    "dots1": {"n_routed_experts": lambda s: s.experts, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": lambda s: ["conv"] * (s.layers - 1) + ["full_attention"]},
    "dbrx.attn_config": {"rope_theta": 10000.0},
    "cohere_compass_text": {"rope_parameters": lambda s: {
        kind: {"rope_type": "default", "rope_theta": 10000.0}
        for kind in ("full_attention", "sliding_attention")}},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp.text_config": _QWEN4,
    # layers that share keys lie among the last ones, and there are few
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n.text_config": {"num_kv_shared_layers": 0},
    "gemma4_assistant.text_config": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_assistant.text_config": {"num_kv_shared_layers": 0},
    # attention is twice as wide as the model; one block is shared, so two layers must use it
    "zamba": _zamba("linear_attention"),
    "zamba2": _zamba("linear_attention") | {"n_mamba_heads": 4},
}  # fmt: skip


def shrunken(config_class: Any, scale: Scale = FIRST) -> Any:
    """Return a small configuration of `config_class`."""
    plain = config_class().to_dict()
    kind = str(config_class.model_type)
    return config_class(**_shrink(plain, kind, scale))


def _shrink(plain: Mapping[str, Any], path: str, scale: Scale) -> dict[str, Any]:
    layers = [value for key, value in plain.items() if _is_layers(key, value)]
    small: dict[str, Any] = {}
    for key, value in plain.items():
        # What a class works out from other attributes, it is to work out anew.
        if key in ("model_type", "per_layer_config", "qk_head_dim"):
            continue
        if isinstance(value, dict) and "model_type" in value:
            small[key] = _shrink(value, f"{path}.{key}", scale) | {
                "model_type": value["model_type"]
            }
        elif isinstance(value, list):
            small[key] = _list(key, value, layers, scale)
        elif isinstance(value, bool) or not isinstance(value, int):
            small[key] = value
        else:
            small[key] = _size(key, value, scale)
    if "kv_lora_rank" in plain and "num_key_value_heads" in plain:
        small["num_key_value_heads"] = scale.heads  # latent attention makes keys for every head
    small = {
        key: value
        for key, value in small.items()
        if value != plain[key] or isinstance(plain[key], list)
    }
    rope = plain.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(scale.head_dim * rope.get("partial_rotary_factor", 1)) // 2
        parts = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
        small["rope_parameters"] = {**rope, "mrope_section": parts}
    for key, value in EXCEPTIONS.get(path, {}).items():
        if value == "absent":
            small.pop(key, None)
        else:
            small[key] = value(scale) if callable(value) else value
    return small


def _is_layers(key: str, value: object) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and bool(_LAYERS.fullmatch(key))
        and not _KEEP_LAYERS.fullmatch(key)
    )


def _list(key: str, value: list[Any], layers: list[int], scale: Scale) -> list[Any]:
    if len(value) in layers and value:  # one entry a layer: every kind of layer, if there is room
        kinds = list(dict.fromkeys(map(repr, value)))
        order = sorted(range(len(value)), key=lambda i: value.index(value[i]) != i)
        chosen = sorted(order[: scale.layers]) if len(kinds) > 1 else range(scale.layers)
        picked = [value[i % len(value)] for i in chosen]
        return [_size(key, each, scale) if type(each) is int else each for each in picked]
    if _TOKEN.fullmatch(key):
        return [_size(key, each, scale) if type(each) is int else each for each in value]
    return value


def _size(key: str, value: int, scale: Scale) -> int:
    rules: tuple[tuple[re.Pattern[str], int], ...] = (
        (_VOCAB, VOCAB),
        (_EXPERTS, scale.experts),
        (_TOP_K, 2),
        (_KV, scale.key_value_heads),
        (_HEADS, scale.heads),
        (_HEAD_DIM, scale.head_dim),
        (_RANK, 16),
        (_INNER, scale.inner),
        (_WIDTH, scale.width),
        (_POSITIONS, 256),
    )
    if _TOKEN.fullmatch(key):
        return value if value < 10 else TEXT_IDS + value % (VOCAB - TEXT_IDS)
    if _is_layers(key, value):
        return min(value, scale.layers)
    for rule, size in rules:
        if rule.fullmatch(key):
            free = rule in (_HEADS, _HEAD_DIM, _INNER, _WIDTH) and value > 1
            return size if free else min(value, size)
    if key in ("n_group", "topk_group", "num_expert_groups"):
        return 1
    if key == "first_k_dense_replace":
        return min(value, 1)
    if "window" in key:
        return min(value, 32)
    return value
