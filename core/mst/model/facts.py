"""What a model is, from config.json and safetensors headers: no torch, no weights read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.errors import ModelError

_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# The format's own limit (safetensors, `MAX_HEADER_SIZE`), so a corrupt length can't eat memory.
_MAX_HEADER_BYTES = 100_000_000


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
    source: str = "headers"


def read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header: tensor name to dtype, shape and offsets.

    Raises:
        ModelError: not a safetensors file, or its length is not what the header says.

    Source: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    again = "Copy the file again and compare its checksum with the source's."
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} is not a whole safetensors file ({size} bytes). {again}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((each["data_offsets"][1] for each in header.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ModelError(f"{path}: the safetensors header is damaged. {again}") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{path} is truncated or damaged: its header asks for {8 + length + end} bytes,"
            f" the file has {size}. {again}"
        )
    return header


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        ModelError: missing or malformed.
    """
    path = directory / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(each.name for each in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{directory} is no model directory: it has no config.json (found: {found})."
            " Give the directory that holds config.json, tokenizer.json and *.safetensors."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise ModelError(f"{path} is not valid JSON. Copy it again from the source.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object. Copy it again from the source.")
    return config


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model directory.

    Raises:
        ModelError: none, a missing shard, or only pickle files (which can run code when read).
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, UnicodeDecodeError):
            raise ModelError(f"{index} is damaged. Copy it again from the source.") from None
        missing = [each for each in names if not (directory / each).is_file()]
        if missing:
            raise ModelError(
                f"{directory} lacks {len(missing)} of {len(names)} weight files: {missing[0]} …"
                " Copy the missing files from the source."
            )
        return tuple(directory / each for each in names)
    if (directory / "model.safetensors").is_file():
        return (directory / "model.safetensors",)
    found = tuple(sorted(directory.glob("model*.safetensors")))
    if found:
        return found
    pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
    if pickles:
        raise ModelError(
            f"{directory} holds its weights as {pickles[0].name} only: a pickle, which can run code"
            " when it is read, so mst refuses it. If you trust where it came from, convert it:"
            ' python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
            f" M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors');"
            f" T.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
        )
    raise ModelError(
        f"{directory} has a config.json but no weights (*.safetensors)."
        " Copy the model's weight files there too."
    )


def _first(config: dict[str, Any], *names: str) -> int | None:
    # Multimodal configs keep the language model's sizes one level down.
    for source in (config, config.get("text_config") or {}):
        for name in names:
            value = source.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _is_embedding(name: str) -> bool:
    return any(each in name for each in ("embed", "wte", "wpe"))


def read_facts(directory: Path) -> ModelFacts:
    """Read a model directory's facts; checks that every weight file is whole.

    Raises:
        ModelError: as `read_config`, `weight_files` and `read_header`.
    """
    config = read_config(directory)
    headers: dict[str, Any] = {}
    for path in weight_files(directory):
        headers |= read_header(path)
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    vocab = _first(config, "vocab_size")
    if not (hidden and layers and vocab and config.get("model_type")):
        raise ModelError(
            f"{directory}/config.json does not describe a language model that mst knows"
            f" (model_type {config.get('model_type')!r}; it needs vocab_size, hidden_size and"
            " num_hidden_layers). Give a causal language model's directory."
        )
    heads = _first(config, "num_attention_heads", "n_head", "n_heads") or 1
    sizes: dict[str, int] = {}
    linears = []
    for name, tensor in headers.items():
        shape: Sequence[int] = tensor["shape"]
        sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + math.prod(shape)
        embedding = vocab in shape or _is_embedding(name)
        if len(shape) == 2 and name.endswith(".weight") and not embedding:
            linears.append(LinearShape(name.removesuffix(".weight"), shape[0], shape[1]))
    return ModelFacts(
        path=str(directory),
        model_type=str(config["model_type"]),
        parameters=sum(sizes.values()),
        weight_bytes=sum(_DTYPE_BYTES.get(kind, 2) * count for kind, count in sizes.items()),
        dtype=max(sizes, key=lambda kind: sizes[kind]),
        layers=layers,
        hidden_size=hidden,
        attention_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=_first(config, "max_position_embeddings", "n_positions", "n_ctx"),
        linears=tuple(linears),
        architecture=str((config.get("architectures") or [""])[0]),
        key_value_heads=_first(config, "num_key_value_heads", "multi_query_group_num") or heads,
        head_dim=_first(config, "head_dim", "kv_channels") or hidden // heads,
        intermediate_size=_first(config, "intermediate_size", "n_inner", "ffn_hidden_size") or 0,
        tied_embeddings=not any(each.startswith("lm_head.") for each in headers),
        embedding_parameters=sum(
            math.prod(each["shape"]) for name, each in headers.items() if _is_embedding(name)
        ),
        head_parameters=sum(
            math.prod(each["shape"]) for name, each in headers.items() if name.startswith("lm_head")
        ),
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
