"""What an optimizer step asks of one device: operations, bytes moved, launches and bytes sent."""

from __future__ import annotations

from dataclasses import dataclass

from mst.configuration import ZERO_STAGES, Configuration, recomputed_layers
from mst.model.facts import ModelFacts, lora_targets
from mst.quantities import FLOAT_BYTES
from mst.training.attention_blocks import keys_met
from mst.training.batches import TOKENS_MULTIPLE

# Kernels that a decoder layer of transformers starts in a forward pass (norms, rotations,
# residuals, activation, attention, seven products), and what PEFT and bitsandbytes add to one
# product. A backward pass starts about as many.
LAYER_LAUNCHES = 45
ADAPTER_LAUNCHES = 6
DEQUANTIZATION_LAUNCHES = 3
# Bytes of a stored weight; NF4 with double quantization takes 4.127 bits (Dettmers et al. 2023,
# "QLoRA", section 3).
STORED_BYTES = {"nf4": 4.127 / 8, "int8": 1.0}
# AdamW over lists of tensors goes over weight, gradient and two moments about two and a half
# times (`_multi_tensor_adamw` of torch 2.13), and clipping twice over the gradient; the 8-bit
# kernels of bitsandbytes go once over float32 weight and gradient and moments of a byte each.
OPTIMIZER_BYTES = {"adamw_torch": 72, "adamw_8bit": 24, "paged_adamw_8bit": 24}
# A float32 weight is cast for a micro-batch's products, its gradient is cast back and added.
CAST_BYTES = 16
ACCUMULATION_BYTES = 12
# Cross-entropy writes and reads what `mst.memory` says that it holds of a logit.
LOGITS_BYTES = 2 * (2 + 4 + 4 + 4 + 2)
# Scores, mask, float32 softmax and its copy in the compute dtype, written and read.
SQUARE_PASSES = 6
# Flash attention's backward pass has five products where the forward pass has two (Dao 2023,
# "FlashAttention-2", section 2.3).
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class ModelWork:
    """What a model costs, summed over its layers once; of experts only those that a token meets.

    Attributes:
        body: weights of the linear layers that a token meets, the output head not counted.
        stored: weights of all linear layers.
        parameters: all weights.
        units: inputs and outputs of the linear layers that a token meets.
        products: how many those are.
        head: weights of the output head.
        vocab: its outputs.
        attention: query heads times their width, over all layers.
        heads: query heads over all layers.
        layers: decoder layers.
        hidden: width of the residual stream.
        adapted: inputs and outputs of the adapted layers that a token meets.
        adapters: how many those are.
        adapter_units: inputs and outputs of all adapted layers; times the rank LoRA's weights.
    """

    body: float
    stored: float
    parameters: int
    units: float
    products: float
    head: float
    vocab: int
    attention: float
    heads: int
    layers: int
    hidden: int
    adapted: float
    adapters: float
    adapter_units: int


@dataclass(frozen=True)
class StepWork:
    """One optimizer step on one device.

    Attributes:
        flop: of matrix products.
        attention_flop: of attention.
        traffic_bytes: moved through its memory by everything that is no product.
        unpacked_bytes: read and written to unpack quantized weights.
        launches: kernels started, one after the other.
        sent_bytes: that it sends to its peers and, at the same time, receives.
        offloaded_bytes: over the bus from and to the host.
        host_updates: weights that the host's optimizer changes for it.
    """

    flop: float
    attention_flop: float
    traffic_bytes: float
    unpacked_bytes: float
    launches: float
    sent_bytes: float
    offloaded_bytes: float
    host_updates: float


def model_work(model: ModelFacts, target_modules: tuple[str, ...]) -> ModelWork:
    """Return what `model` costs.

    Raises:
        ModelError: `target_modules` match nothing.
    """
    met = model.experts_per_token / model.experts if model.experts else 1.0

    def share(name: str) -> float:
        return met if model.experts and ".experts." in name else 1.0

    body = stored = units = products = 0.0
    for each in model.linears:
        part = share(each.name)
        body += part * each.out_features * each.in_features
        stored += each.out_features * each.in_features
        units += part * (each.out_features + each.in_features)
        products += part
    if model.expert_parameters and not any(".experts." in each.name for each in model.linears):
        # Experts kept as one tensor are no linear layers; three matrices each, as in Mixtral.
        expert = model.expert_parameters / (3 * model.hidden_size * model.experts * model.layers)
        body += met * model.expert_parameters
        stored += model.expert_parameters
        products += 3 * model.experts_per_token * model.layers
        units += 3 * (model.hidden_size + expert) * model.experts_per_token * model.layers
    targets = lora_targets(model, target_modules)
    head_width = model.head_dim or model.hidden_size // model.attention_heads
    return ModelWork(
        body=body,
        stored=stored,
        parameters=model.parameters,
        units=units,
        products=products,
        head=float(model.vocab_size * model.hidden_size),
        vocab=model.vocab_size,
        attention=float(head_width * model.attention_heads * model.layers),
        heads=model.attention_heads * model.layers,
        layers=model.layers,
        hidden=model.hidden_size,
        adapted=sum(share(one.name) * (one.out_features + one.in_features) for one in targets),
        adapters=sum(share(one.name) for one in targets),
        adapter_units=sum(one.out_features + one.in_features for one in targets),
    )


def step_work(
    work: ModelWork,
    made: Configuration,
    tokens: float,
    label_tokens: float,
    mean_row_tokens: float,
    elementwise_passes: float,
) -> StepWork:
    """Return what one optimizer step asks of one device.

    Args:
        work: the model's.
        made: how it is trained.
        tokens: of the step on all devices, padding included.
        label_tokens: of these, how many carry loss.
        mean_row_tokens: length of an average sequence that is read. Of those that `--packing` has
            put end to end, where attention is computed in blocks; else of what they make up.
        elementwise_passes: how often a layer's inputs and outputs move through memory in a
            forward pass, beside the products themselves.

    Source: products from Kaplan et al. 2020, "Scaling Laws", section 2.1: 2 operations a weight
    and token forward and 4 backward, of which frozen weights need 2; attention and recomputation
    from Narayanan et al. 2021, "Efficient Large-Scale Language Model Training", section 5.1.
    """
    own = tokens / made.world_size
    labels = label_tokens / made.world_size
    again = _again(work, made)
    full = made.tuner == "full"
    trained = float(work.parameters if full else made.lora_rank * work.adapter_units)
    if made.use_dora and not full:
        trained += work.adapter_units / 2  # a magnitude for each output
    flop = 2 * (3 + again if full else 2 + again) * work.body * own
    flop += 2 * (3 if full else 2) * work.head * labels
    # Passes without gradients; the reference's leave the adapters out.
    flop += 2 * made.extra_passes * (work.body * own + work.head * labels)
    if not full:
        flop += 2 * (3 + again) * made.lora_rank * work.adapted * own
    offloaded, updates = _offloaded(work, made, trained)
    if made.activation_offloading:
        # The hidden states of all recomputed layers but the last, down and up.
        states = max(0, recomputed_layers(made, work.layers) - 1) * work.hidden * own
        offloaded += 2 * FLOAT_BYTES[made.weights_dtype] * states
    return StepWork(
        flop=flop,
        attention_flop=_attention_flop(work, made, own, mean_row_tokens),
        traffic_bytes=_activation_traffic(
            work, made, own, labels, mean_row_tokens, elementwise_passes
        )
        + _weight_traffic(work, made, trained),
        unpacked_bytes=_unpacked(work, made),
        launches=_launches(work, made),
        sent_bytes=_sent(work, made, trained),
        offloaded_bytes=offloaded,
        host_updates=updates,
    )


def _span(made: Configuration, mean_row_tokens: float) -> float:
    """Return how many positions a token's scores are computed for."""
    rows = made.micro_batch * made.sequences
    together = rows * mean_row_tokens
    if rows > 1 and not made.scores:
        # Rows laid end to end in lines as wide as the longest of them, or more.
        return min(together, 2 * mean_row_tokens + TOKENS_MULTIPLE)
    return mean_row_tokens


def _attention_flop(
    work: ModelWork, made: Configuration, tokens: float, mean_row_tokens: float
) -> float:
    span = _span(made, mean_row_tokens)
    if made.block_attention:
        span = keys_met(mean_row_tokens, span)
    elif made.micro_batch * made.sequences == 1 and made.attention != "eager":
        span /= 2  # causal kernels leave out the half that is masked
    passes = 1 + _again(work, made) + ATTENTION_BACKWARD + made.extra_passes
    return 4 * passes * span * work.attention * tokens


def _activation_traffic(
    work: ModelWork,
    made: Configuration,
    tokens: float,
    labels: float,
    mean_row_tokens: float,
    elementwise_passes: float,
) -> float:
    # Backward passes read what they differentiate beside the gradients: twice the forward one.
    passes = 3 + _again(work, made) + made.extra_passes
    moved = elementwise_passes * work.units
    if made.tuner != "full":
        moved += 2 * work.adapted
    square = 0.0
    if made.attention == "eager":
        square = SQUARE_PASSES * _span(made, mean_row_tokens) * work.heads
    width = FLOAT_BYTES[made.compute_dtype]
    logits = LOGITS_BYTES * work.vocab * labels * (1 + made.extra_passes / 2)
    return width * passes * (moved + square) * tokens + logits


def _weight_traffic(work: ModelWork, made: Configuration, trained: float) -> float:
    """Return bytes moved for gradients, casts and the optimizer's own share of the weights."""
    moved = ACCUMULATION_BYTES * trained * made.accumulation
    # Each token that is sampled reads all weights; keys and values of those before are left out.
    moved += made.samples * _held(work, made) * made.accumulation
    if made.tuner == "full" and made.compute_dtype != made.weights_dtype:
        moved += CAST_BYTES * trained * made.accumulation
    if made.use_dora:
        # The norm of each adapted matrix and its update, as PEFT computes them: a float32 copy,
        # the product of the adapters and their sum, each written and read.
        moved += 3 * 2 * 4 * work.stored * made.accumulation
    if made.offload == "none":
        shares = made.world_size if ZERO_STAGES[made.strategy] else 1
        moved += OPTIMIZER_BYTES[made.optim] * trained / shares
    return moved


def _unpacked(work: ModelWork, made: Configuration) -> float:
    """Return bytes moved to unpack the weights in each pass over each micro-batch."""
    if made.quantization == "none":
        return 0.0
    passes = _passes(work, made)
    width = STORED_BYTES[made.quantization] + FLOAT_BYTES[made.compute_dtype]
    return passes * width * work.stored * made.accumulation


def _launches(work: ModelWork, made: Configuration) -> float:
    passes = _passes(work, made)
    count = float(LAYER_LAUNCHES * work.layers)
    if made.tuner != "full":
        count += ADAPTER_LAUNCHES * work.adapters
    if made.quantization != "none":
        count += DEQUANTIZATION_LAUNCHES * work.products
    return passes * count * made.accumulation


def _sent(work: ModelWork, made: Configuration, trained: float) -> float:
    """Return bytes that a rank sends in a step.

    A ring passes (N - 1) / N of a tensor on for a gather or a scatter, twice that for a sum.

    Source: Rajbhandari et al. 2020, "ZeRO", section 7; a micro-batch's weights are gathered anew
    for each pass over them.
    """
    others = (made.world_size - 1) / made.world_size
    width = FLOAT_BYTES[made.compute_dtype]
    stage = ZERO_STAGES[made.strategy]
    if stage == 0:
        return 2 * others * 4 * trained  # gradients are summed in float32, once a step
    if stage == 1:
        return 2 * others * width * trained
    reduced = others * width * trained * made.accumulation
    if stage == 2:
        return reduced + others * width * trained
    return reduced + others * _held(work, made) * _passes(work, made) * made.accumulation


def _held(work: ModelWork, made: Configuration) -> float:
    """Return bytes of all weights as they are kept and gathered."""
    width = FLOAT_BYTES[made.compute_dtype]
    if made.quantization == "none":
        return width * work.parameters
    return STORED_BYTES[made.quantization] * work.stored + width * (work.parameters - work.stored)


def _passes(work: ModelWork, made: Configuration) -> float:
    return 2 + _again(work, made) + made.extra_passes + made.samples


def _again(work: ModelWork, made: Configuration) -> float:
    """Return what share of a forward pass checkpointing computes once more."""
    layers = max(1, work.layers)
    return recomputed_layers(made, layers) / layers


def _offloaded(work: ModelWork, made: Configuration, trained: float) -> tuple[float, float]:
    """Return bytes over the bus and weights updated on the host, of one rank.

    Source: Ren et al. 2021, "ZeRO-Offload", section 4: gradients go down, weights come up.
    """
    if made.offload == "none":
        return 0.0, 0.0
    width = FLOAT_BYTES[made.compute_dtype]
    share = trained / made.world_size
    moved = width * share * (made.accumulation + 1)
    if made.offload == "parameters":
        moved += _held(work, made) / made.world_size * _passes(work, made) * made.accumulation
    return moved, share
