"""Shapes of published models, as their config.json files give them, for plans without weights."""

from __future__ import annotations

from mst.model.facts import LinearShape, ModelFacts


def decoder(
    name: str,
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool = False,
    context: int = 4096,
) -> ModelFacts:
    """Return the facts of a Llama-like decoder (gated feed-forward, grouped queries)."""
    head = hidden // heads
    narrow = kv_heads * head
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    linears = tuple(
        LinearShape(f"model.layers.{layer}.{each}", *shape)
        for layer in range(layers)
        for each, shape in shapes.items()
    )
    embedding = vocab * hidden
    norms = (2 * layers + 1) * hidden
    weights = sum(each.out_features * each.in_features for each in linears)
    parameters = weights + embedding * (1 if tied else 2) + norms
    return ModelFacts(
        path=name,
        model_type="llama",
        parameters=parameters,
        weight_bytes=2 * parameters,
        dtype="BF16",
        layers=layers,
        hidden_size=hidden,
        attention_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=context,
        linears=linears,
        architecture="LlamaForCausalLM",
        key_value_heads=kv_heads,
        head_dim=head,
        intermediate_size=inner,
        tied_embeddings=tied,
        embedding_parameters=embedding,
        head_parameters=0 if tied else embedding,
    )


SMOLLM2_135M = decoder("SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, tied=True, context=8192)
LLAMA_2_7B = decoder("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000)
LLAMA_3_8B = decoder("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256, context=8192)
LLAMA_2_13B = decoder("Llama-2-13B", 40, 5120, 13824, 40, 40, 32000)
QWEN_2_5_32B = decoder("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 152064, context=32768)
LLAMA_3_70B = decoder("Llama-3-70B", 80, 8192, 28672, 64, 8, 128256, context=8192)
