"""What a model is, from config.json and safetensors headers: no torch, no weights read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mst import cache
from mst.errors import ModelError
from mst.model.files import read_config, read_header, weight_files
from mst.model.sizes import impossible_size, text_part
from mst.seal.keys.ring import NO_KEYS, KeyRing

__all__ = [
    "LinearShape", "ModelFacts", "lora_parameters", "lora_targets", "read_config", "read_facts",
    "read_header", "read_kept_facts", "weight_files",
]  # fmt: skip

_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class LinearShape:
    """One linear layer that LoRA can adapt: its module path and sizes."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class ModelFacts:
    """A causal language model's shape.

    Attributes:
        path: the directory.
        model_type: transformers' name of the architecture ("llama").
        parameters: weights in the files; tied ones once.
        weight_bytes: size of the tensors on disk.
        dtype: the dtype that holds most of the weights, as safetensors names it.
        layers: decoder layers.
        hidden_size: width of the residual stream.
        attention_heads: query heads, for the size of an attention matrix.
        vocab_size: rows of the embedding.
        max_position_embeddings: longest context; None when the config doesn't say.
        linears: every linear layer but the output head, as the model's modules are named.
        architecture: the class that transformers builds ("LlamaForCausalLM").
        key_value_heads: heads of keys and values; 0 when unknown.
        head_dim: width of one head; 0 when unknown.
        intermediate_size: inner width of a feed-forward layer; 0 when unknown.
        tied_embeddings: the output head shares the embedding's weights.
        embedding_parameters: of the input embeddings; a tied head is in them.
        head_parameters: of an output head of its own.
        expert_parameters: in mixture-of-experts layers, all experts.
        experts: in a layer; 0 in dense models.
        experts_per_token: of these, how many a token meets.
        window: tokens back that some of its layers see; None where all see everything.
        source: "headers" when the files told, "trace" when the model's class was asked.
    """

    path: str
    model_type: str
    parameters: int
    weight_bytes: int
    dtype: str
    layers: int
    hidden_size: int
    attention_heads: int
    vocab_size: int
    max_position_embeddings: int | None
    linears: tuple[LinearShape, ...]
    architecture: str = ""
    key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    tied_embeddings: bool = False
    embedding_parameters: int = 0
    head_parameters: int = 0
    expert_parameters: int = 0
    experts: int = 0
    experts_per_token: int = 0
    window: int | None = None
    source: str = "headers"


def read_facts(
    directory: Path,
    *,
    weights: bool = True,
    tell: Callable[[str], None] = lambda line: None,
    cache_dir: Path | None = None,
    keys: KeyRing = NO_KEYS,
) -> ModelFacts:
    """Return a model directory's facts; checks that every weight file is whole.

    The files alone tell those of the families in families.json; the class of transformers is
    asked for the others, and for a directory without weights.

    Args:
        directory: with config.json and safetensors.
        weights: False to plan for a model whose weights are not here.
        tell: shown to the user before it takes some seconds.
        cache_dir: keeps what a class said; default the user's cache.
        keys: of the encrypted run whose weights lie there; none where they are plain.

    Raises:
        ModelError: as `read_config`, `weight_files` and `read_header`; the files contradict
            each other; they are quantized; or the architecture is not known.
    """
    from mst.model.trace import traced_facts

    config = read_config(directory)
    _check_config(directory, config, weights)
    headers: dict[str, Any] = {}
    found = None
    if weights:
        for path in weight_files(directory, bool(keys.key_files)):
            headers |= read_header(path, keys)
        found = _told_by_files(config, headers)
    if found is None:
        found = traced_facts(directory, cache_dir or cache.cache_dir(), tell)
    return _completed(directory, config, found, headers if weights else None)


def read_kept_facts(
    directory: Path, config: Mapping[str, Any], headers: Mapping[str, Any]
) -> ModelFacts | None:
    """Return a model's facts without asking its class: from its files, or from what was kept.

    Args:
        directory: of the model.
        config: its config.json.
        headers: of its weight files, all in one.

    Returns:
        None where only the class of transformers would tell.

    Raises:
        ModelError: as `read_facts`.
    """
    from mst.model.trace import kept_facts

    _check_config(directory, config, weights=True)
    found = _told_by_files(config, headers)
    if found is None:
        found = kept_facts(directory, cache.cache_dir())
    return None if found is None else _completed(directory, config, found, headers)


def _told_by_files(config: Mapping[str, Any], headers: Mapping[str, Any]) -> ModelFacts | None:
    """Return the facts of a model whose family is in families.json."""
    from mst.model.families import find_family, header_facts

    family = find_family(config)
    return header_facts(family, config, headers) if family else None


def _completed(
    directory: Path,
    config: Mapping[str, Any],
    found: ModelFacts,
    headers: Mapping[str, Any] | None,
) -> ModelFacts:
    """Return facts with what the directory alone tells; `headers` is None without weights."""
    if headers is not None:
        _check_agree(directory, found, headers)
        found = replace(found, **on_disk(headers))
    return replace(found, path=str(directory), window=_window(text_part(config)))


def _window(config: Mapping[str, Any]) -> int | None:
    """Return how far back the layers see that don't see everything."""
    kinds = config.get("layer_types")
    everything = isinstance(kinds, list) and not any(
        "sliding" in str(each) or "chunked" in str(each) for each in kinds
    )
    if everything or config.get("use_sliding_window") is False:
        return None
    found = [config.get(name) for name in ("sliding_window", "attention_chunk_size")]
    return min((each for each in found if isinstance(each, int) and each > 0), default=None)


def _check_config(directory: Path, config: Mapping[str, Any], weights: bool) -> None:
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{directory}/config.json names no model_type, so nobody can tell what it describes."
            " Give a causal language model's directory, with the config.json of its source."
        )
    if wrong := impossible_size(config):
        raise ModelError(
            f"{directory}/config.json is damaged: {wrong}, which no model has."
            " Copy it again from the source."
        )
    quantized = config.get("quantization_config") or text_part(config).get("quantization_config")
    if quantized and weights:
        named = quantized.get("quant_method") if isinstance(quantized, dict) else None
        plain = isinstance(named, str) and named.isprintable()
        method = str(named)[:40] if plain else "another tool"
        raise ModelError(
            f"{directory} holds weights that {method} has quantized; mst trains"
            " from the original ones, and quantizes them itself (--tuner qlora). Give the"
            " directory of the model that this one was made from, in bfloat16 or float16."
        )


def on_disk(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelFacts` that the weight files alone decide."""
    sizes: dict[str, int] = {}
    for tensor in headers.values():
        sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    return {
        "weight_bytes": sum(_DTYPE_BYTES.get(kind, 2) * count for kind, count in sizes.items()),
        "dtype": max(sizes, key=lambda kind: sizes[kind]),
    }


def _check_agree(directory: Path, facts: ModelFacts, headers: Mapping[str, Any]) -> None:
    """Make sure that the files hold the model that config.json describes.

    Raises:
        ModelError: they don't; says which size differs.
    """
    again = "They don't belong together: copy both again from the source."
    for each in facts.linears:
        tensor = headers.get(f"{each.name}.weight")
        shape = (each.out_features, each.in_features)
        if tensor is not None and tuple(tensor["shape"]) not in (shape, shape[::-1]):
            raise ModelError(
                f"{directory}: config.json makes {each.name} {shape[0]} x {shape[1]}, the weight"
                f" files hold {tuple(tensor['shape'])}. {again}"
            )
    matrices = {tuple(each["shape"]) for each in headers.values() if len(each["shape"]) == 2}
    if facts.vocab_size and not any(facts.vocab_size in shape for shape in matrices):
        raise ModelError(
            f"{directory}: config.json says vocab_size {facts.vocab_size}, hidden_size"
            f" {facts.hidden_size}; no tensor in the weight files has so many rows. {again}"
        )
    if facts.source == "headers":
        _check_layers(directory, facts, headers)
        return
    held = sum(math.prod(each["shape"]) for each in headers.values())
    # A checkpoint may leave out what is computed, tied or shared; not a tenth of the model.
    if held < 0.9 * facts.parameters:
        raise ModelError(
            f"{directory}: config.json describes {facts.parameters} weights, the files hold"
            f" {held}. {again}"
        )


def _check_layers(directory: Path, facts: ModelFacts, headers: Mapping[str, Any]) -> None:
    numbers = {int(part) for name in headers for part in name.split(".")[:4] if part.isdigit()}
    widths = {tuple(each["shape"])[-1] for name, each in headers.items() if "norm" in name}
    again = "They don't belong together: copy both again from the source."
    if len(numbers) != facts.layers:
        raise ModelError(
            f"{directory}: config.json says {facts.layers} layers, the weight files hold"
            f" {len(numbers)}. {again}"
        )
    if widths and facts.hidden_size not in widths:
        raise ModelError(
            f"{directory}: config.json says hidden_size {facts.hidden_size}, the norms in the"
            f" weight files are {', '.join(map(str, sorted(widths)))} wide. {again}"
        )


def lora_targets(facts: ModelFacts, target_modules: Sequence[str]) -> tuple[LinearShape, ...]:
    """Return the linear layers that `target_modules` names, by PEFT's rule.

    Args:
        facts: the model.
        target_modules: ("all-linear",), or module names matched as a whole path or its end.

    Raises:
        ModelError: when nothing matches; lists the names that the model has.
    """
    if tuple(target_modules) == ("all-linear",):
        return facts.linears
    found = tuple(
        each
        for each in facts.linears
        if any(each.name == name or each.name.endswith("." + name) for name in target_modules)
    )
    if not found:
        names = sorted({each.name.split(".")[-1] for each in facts.linears})
        raise ModelError(
            f"--target-modules {' '.join(target_modules)} matches no linear layer of {facts.path}"
            f" (it has: {', '.join(names)}). Pass some of these, or all-linear."
        )
    return found


def lora_parameters(shapes: Sequence[LinearShape], rank: int) -> int:
    """Count the weights LoRA trains: the sum of rank * (out + in); both factors, no bias.

    Source: Hu et al. 2021, "LoRA", section 4.1.
    """
    return sum(rank * (each.out_features + each.in_features) for each in shapes)
