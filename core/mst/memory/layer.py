"""What one decoder layer is made of, read from a model's facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mst.model.facts import LinearShape, ModelFacts

# Names of linear layers by their place, as transformers' decoders spell them.
ATTENTION_IN = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "key",
    "value", "in_proj", "q_a_proj", "kv_a_proj_with_mqa",
)  # fmt: skip
GATES = ("gate_proj", "gate_up_proj", "w1", "dense_h_to_4h_gated", "input_linear")
MLP_IN = (*GATES, "up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
MLP_OUT = ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "output_linear")
# Architectures whose norms are torch's LayerNorm, with a saved input and no float32 copy of it.
LAYER_NORM = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "bloom", "falcon", "opt", "phi", "mpt",
    "starcoder2", "stablelm", "codegen", "cohere", "biogpt", "xglm", "persimmon", "nemotron",
)  # fmt: skip
# Architectures whose queries and keys have norms of their own.
QK_NORM = (
    "qwen3", "qwen3_moe", "qwen3_next", "gemma3", "gemma3_text", "olmo2", "olmo3", "olmoe",
    "cohere2", "glm4_moe", "exaone4", "hunyuan_v1_dense", "smollm3_qk", "apertus",
)  # fmt: skip
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text", "glm4")
# transformers' NewGELUActivation is written out in seven operators; torch's own GELU is one.
WRITTEN_OUT_GELU = ("gpt2", "gpt_neo", "gptj", "codegen", "phi", "phi_new", "bloom")


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's widths; products of all experts that a token meets are taken together.

    Attributes:
        hidden: width of the residual stream.
        queries: width of all query heads.
        keys: width of all key heads, and of all value heads.
        heads: query heads.
        inner: width of the feed-forward layer, times the experts that a token meets.
        experts_per_token: copies of a token that go through experts; 0 in dense layers.
        gated: the feed-forward layer has a gate.
        written_out_gelu: its activation is made of many operators.
        layer_norm: norms are LayerNorm, else RMSNorm.
        norms: over the residual stream.
        qk_norm: queries and keys have norms.
        attention_inputs: linear layers that read the first norm.
        mlp_inputs: linear layers that read the second.
        weights: values of the layer's linear layers and experts.
        attention_weights: of these, those of attention.
        adapted: of "attention_in", "attention_out", "mlp_in", "mlp_out", those with adapters.
        adapters: how many linear layers of this layer have an adapter.
        adapted_width: their inputs and outputs, summed.
    """

    hidden: int
    queries: int
    keys: int
    heads: int
    inner: int
    experts_per_token: int
    gated: bool
    written_out_gelu: bool
    layer_norm: bool
    norms: int
    qk_norm: bool
    attention_inputs: int
    mlp_inputs: int
    weights: int
    attention_weights: int
    adapted: frozenset[str]
    adapters: float
    adapted_width: float


def _role(linear: LinearShape) -> str:
    leaf = linear.name.rsplit(".", 1)[-1]
    if leaf in ATTENTION_IN:
        return "attention_in"
    if leaf in MLP_IN:
        return "mlp_in"
    if leaf in MLP_OUT:
        return "mlp_out"
    # c_proj and dense name the last layer of either half.
    return "mlp_out" if ".mlp." in linear.name else "attention_out"


def decoder_layer(model: ModelFacts, targets: Sequence[LinearShape]) -> DecoderLayer:
    """Return an average layer of the model.

    Args:
        model: its shape.
        targets: the linear layers with adapters; empty in full tuning.
    """
    layers = max(1, model.layers)
    heads = max(1, model.attention_heads)
    head = model.head_dim or model.hidden_size // heads
    names = {each.name.rsplit(".", 1)[-1] for each in model.linears}
    roles = [_role(each) for each in model.linears]
    inner, copies = _inner(model, names)
    dense = sum(each.out_features * each.in_features for each in model.linears)
    kind = model.model_type
    return DecoderLayer(
        hidden=model.hidden_size,
        queries=heads * head,
        keys=(model.key_value_heads or heads) * head,
        heads=heads,
        inner=inner,
        experts_per_token=copies,
        gated=bool(names & set(GATES)) or (copies > 0 and kind not in ("dbrx",)),
        written_out_gelu=kind in WRITTEN_OUT_GELU,
        layer_norm=kind in LAYER_NORM,
        norms=4 if kind in FOUR_NORMS else 2,
        qk_norm=kind in QK_NORM,
        attention_inputs=max(1, round(roles.count("attention_in") / layers)),
        mlp_inputs=max(1, min(2, round(roles.count("mlp_in") / layers))),
        weights=max(dense, dense + _fused_experts(model, dense)) // layers,
        attention_weights=sum(
            each.out_features * each.in_features
            for each, role in zip(model.linears, roles, strict=True)
            if role.startswith("attention")
        )
        // layers,
        adapted=frozenset(_role(each) for each in targets),
        adapters=len(targets) / layers,
        adapted_width=sum(each.in_features + each.out_features for each in targets) / layers,
    )


def _fused_experts(model: ModelFacts, dense: int) -> int:
    """Return the experts' weights that are no linear layers but one tensor of all experts."""
    return max(0, min(model.expert_parameters, model.parameters - dense))


def _inner(model: ModelFacts, names: set[str]) -> tuple[int, int]:
    """Return the feed-forward width that a token meets, and through how many experts."""
    if model.experts and model.expert_parameters:
        copies = max(1, model.experts_per_token)
        one = model.expert_parameters // (max(1, model.layers) * model.experts)
        return copies * max(1, one // (3 * model.hidden_size)), copies
    if model.intermediate_size:
        return model.intermediate_size, 0
    widest = [each.in_features for each in model.linears if _role(each) == "mlp_out"]
    return max(widest, default=4 * model.hidden_size), 0
