"""The architectures whose files alone tell their structure, and how.

families.json is made by benchmarks/model_coverage.py: for each model_type, which names its tensors
have in a checkpoint and what each is in the model. An architecture is listed only when what
`header_facts` says of a second model, of other sizes, equals what the built model says of itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from mst.model.sizes import Sizes, read_sizes, text_part

if TYPE_CHECKING:
    from mst.model.facts import LinearShape, ModelFacts

KINDS = ("linear", "conv1d", "embedding", "head", "expert", "other", "buffer")


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one model_type are to be read.

    Attributes:
        architecture: the class that transformers builds.
        tied: the output head shares the embedding's weights when config.json doesn't say.
        needs: keys that config.json must hold, because the class has defaults of its own.
        tensors: of each kind of `KINDS`, the tensors' names, every number replaced by "*".
    """

    architecture: str
    tied: bool
    needs: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]


def pattern(name: str) -> str:
    """Return a tensor's name with every number between dots replaced by "*"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@lru_cache(maxsize=1)
def known_families() -> Mapping[str, Family]:
    """Return the families by model_type."""
    text = files("mst.model").joinpath("families.json").read_text(encoding="utf-8")
    return {
        name: Family(
            each["architecture"],
            each["tied"],
            tuple(each["needs"]),
            {kind: tuple(names) for kind, names in each["tensors"].items()},
        )
        for name, each in json.loads(text).items()
    }


def find_family(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a config.json, or None when its files alone don't tell enough."""
    kind = config.get("model_type")
    if kind == "mistral" and "layer_types" in config:
        kind = "ministral"  # as AutoConfig.from_pretrained has it
    family = known_families().get(str(kind))
    if family is None or any(text_part(config).get(key) is None for key in family.needs):
        return None
    return family


def header_facts(
    family: Family, config: Mapping[str, Any], headers: Mapping[str, Any]
) -> ModelFacts | None:
    """Return a model's facts from its files; None when they hold a tensor that is not known.

    Args:
        family: from `find_family`.
        config: config.json.
        headers: of all its safetensors files, by tensor name.
    """
    from mst.model.facts import LinearShape, ModelFacts

    kind_of = {name: kind for kind, names in family.tensors.items() for name in names}
    kinds = {name: kind_of.get(pattern(name)) for name in headers}
    if None in kinds.values() or "embedding" not in kinds.values():
        return None
    text = text_part(config)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", family.tied))
    heads = {name for name, kind in kinds.items() if kind == "head"}
    matrix = {name for name in heads if len(headers[name]["shape"]) == 2}
    if not isinstance(tied, bool) or not (tied or matrix):
        return None  # the class would make a head of its own
    if tied:  # some checkpoints hold the shared weights twice
        kinds = {name: kind for name, kind in kinds.items() if name not in matrix}
    sizes = read_sizes(text.get)
    count = dict.fromkeys(KINDS, 0)
    linears: list[LinearShape] = []
    for name, kind in kinds.items():
        shape = headers[name]["shape"]
        count[str(kind)] += math.prod(shape)
        if kind in ("linear", "conv1d"):
            out, inner = shape if kind == "linear" else shape[::-1]
            linears.append(LinearShape(name.removesuffix(".weight"), out, inner))
    count["buffer"] = 0
    return ModelFacts(
        path="",
        model_type=str(config["model_type"]),
        parameters=sum(count.values()),
        weight_bytes=0,
        dtype="",
        layers=sizes.layers,
        hidden_size=sizes.hidden_size,
        attention_heads=sizes.attention_heads,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_position_embeddings,
        linears=tuple(linears),
        architecture=family.architecture,
        key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        tied_embeddings=tied,
        embedding_parameters=count["embedding"],
        head_parameters=count["head"],
        expert_parameters=count["expert"],
        experts=sizes.experts if count["expert"] else 0,
        experts_per_token=sizes.experts_per_token if count["expert"] else 0,
        source="headers",
    )


def learn(
    architecture: str,
    kinds: Mapping[str, str],
    headers: Mapping[str, Any],
    buffers: frozenset[str],
    tied: bool,
    needs: tuple[str, ...],
) -> Family:
    """Return how a model_type's checkpoints read, from one built model and its saved files.

    Args:
        architecture: its class.
        kinds: what each of its parameters is (`mst.model.structure.Structure`).
        headers: its saved tensors.
        buffers: names of what it holds that is no weight.
        tied: the class ties the head when config.json doesn't say.
        needs: see `Family`.
    """
    tensors: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name in headers:
        tensors[_kind(name, kinds, buffers)].add(pattern(name))
    return Family(
        architecture,
        tied,
        needs,
        {kind: tuple(sorted(names)) for kind, names in tensors.items() if names},
    )


def _kind(name: str, kinds: Mapping[str, str], buffers: frozenset[str]) -> str:
    if name in kinds:
        return kinds[name]
    if name in buffers:
        return "buffer"
    # Under another name in the built model: checkpoints hold each expert by itself, for one.
    return "expert" if is_expert(name) else "other"


def is_expert(name: str) -> bool:
    """Return whether a tensor's name says that it belongs to the experts of a layer."""
    return any(part.endswith("experts") and "shared" not in part for part in name.split(".")[:-1])


def missing_keys_that_matter(
    config: Mapping[str, Any], sizes_without: Mapping[str, Sizes]
) -> tuple[str, ...]:
    """Return the keys without which config.json would be misread.

    Args:
        config: a config.json that gives every size.
        sizes_without: what transformers reads when each of these keys is left out.
    """
    text = text_part(config)
    wrong = []
    for key, truth in sizes_without.items():
        rest = {name: value for name, value in text.items() if name != key}
        if asdict(read_sizes(rest.get)) != asdict(truth):
            wrong.append(key)
    return tuple(sorted(wrong))
