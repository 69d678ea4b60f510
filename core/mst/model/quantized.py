"""Which layers of a model become quantized, known without building it."""

from __future__ import annotations

from mst.model.facts import LinearShape, ModelFacts

# Where transformers 5.23 leaves linear layers as they are, because the class is not exactly
# `torch.nn.Linear` (`replace_with_bnb_linear`), or because the architecture keeps them in float32
# or ties them (`get_modules_to_not_convert`): parts of a layer's name, "" for all layers. Found by
# asking that code for every architecture that it has: of 181 that could be built small, 162 are
# quantized exactly where LoRA adapts them.
_LEFT_ALONE = {
    "falcon": ("",),
    "axk2": ("indexer.weights_proj",),
    "deepseek_v32": ("indexer.weights_proj",),
    "glm_moe_dsa": ("indexer.weights_proj",),
    "deepseek_v4": ("compressor.gate_proj", "compressor.kv_proj"),
    "blt": ("patcher.lm_head",),
    "zamba": ("shared_transf.",),
    "zamba2": ("shared_transformer.",),
}


def quantized_linears(facts: ModelFacts) -> tuple[LinearShape, ...]:
    """Return the layers that hold 4 or 8 bits a weight under --tuner qlora.

    These are `facts.linears`, Conv1D of GPT-2 too, but for what transformers leaves alone. Not
    among them, and held in the dtype of the weights: embeddings, the output head, norms, biases,
    routers and experts in one 3-dimensional tensor. Towers for images and sound and Mamba's
    `out_proj` are quantized although they are not among `facts.linears`: counting them whole errs
    on the safe side.
    """
    parts = _LEFT_ALONE.get(facts.model_type, ())
    return tuple(each for each in facts.linears if not any(part in each.name for part in parts))
