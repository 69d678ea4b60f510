"""A model's structure, from the modules that transformers builds; needs torch, but no weights."""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.errors import ModelError
from mst.model.facts import LinearShape, ModelFacts
from mst.model.families import is_expert
from mst.model.files import read_config
from mst.model.sizes import Sizes, read_sizes

if TYPE_CHECKING:
    import torch

# PEFT refuses LoRA on these: the fused kernel reads their weights past the module's forward
# (`_check_lora_target_modules_mamba` in peft/tuners/tuners_utils.py, 0.21.2).
_MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_MAMBA_MODULES = ("out_proj", "conv1d")
# Linear layers to Python alone: routers that return their choice of experts too (Llama 4,
# PhiMoE), and layers that multiply group by group (DeepSeek-V4). An adapter around one fails.
_NOT_LINEAR = ("Router", "GroupedLinear")
# Their weights are read past the module's forward, which 4-bit weights don't survive.
NOT_QUANTIZED = {"mamba": ("dt_proj",)}
_DTYPES = {
    "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16",
    "torch.float64": "F64",
}  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """A built model, described.

    Attributes:
        facts: its facts, with an empty path.
        kinds: of each parameter: "linear", "conv1d" (shape in, out), "embedding", "head",
            "expert" or "other".
        buffers: names of what the model holds that is no weight.
    """

    facts: ModelFacts
    kinds: Mapping[str, str]
    buffers: frozenset[str]


def auto_class(config: Any) -> Any:
    """Return the auto class that builds a decoder for `config`: for text, or image and text.

    Raises:
        ModelError: transformers has neither for this configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    classes: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    for each in classes:
        if type(config) in each._model_mapping:
            return each
    raise ModelError(
        f"transformers has no decoder for model_type {config.model_type!r}: it generates no text,"
        " or it is an encoder. Give a causal language model's directory."
    )


def score_class(config: Any) -> Any:
    """Return the auto class that builds `config`'s decoder with a head for scores.

    Raises:
        ModelError: transformers has none for this configuration.
    """
    from transformers import AutoModelForSequenceClassification

    untyped: Any = AutoModelForSequenceClassification
    if type(config) in untyped._model_mapping:
        return untyped
    raise ModelError(
        f"transformers has no reward model (sequence classification) for model_type"
        f" {config.model_type!r}. Give a model of another architecture, or pass another --task."
    )


def score_head(model: Any) -> torch.nn.Module | None:
    """Return the head of a model with scores; None of a language model."""
    if "ForSequenceClassification" not in type(model).__name__:
        return None
    heads = (getattr(model, name, None) for name in ("score", "classifier"))
    return next((each for each in heads if each is not None), None)


def build_on_meta(directory: Path) -> Any:
    """Return the model that config.json describes, without memory for its weights.

    Raises:
        ModelError: transformers has no class for it, or the class refuses the sizes.
    """
    import torch
    from transformers import AutoConfig

    _check_known(directory)
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        # Quantized checkpoints hold the same layers in other numbers.
        for each in (config, config.get_text_config(decoder=True)):
            if hasattr(each, "quantization_config"):
                del each.quantization_config
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # whatever a class thinks of sizes that don't fit together
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"transformers can't build the model that {directory}/config.json describes:"
            f" {type(error).__name__}: {lines[-1].strip()[:300]}. Compare config.json with the"
            " source's; a newer model may need a newer transformers."
        ) from None


def _check_known(directory: Path) -> None:
    from transformers.models.auto import configuration_auto

    untyped: Any = configuration_auto
    known = list(untyped.CONFIG_MAPPING_NAMES)

    config = read_config(directory)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in known:
        return
    near = difflib.get_close_matches(str(kind), known, n=3, cutoff=0.5)
    own = " It comes with code of its own, which mst never runs." if "auto_map" in config else ""
    raise ModelError(
        f"{directory}/config.json says model_type {kind!r}, which transformers"
        f" {importlib.metadata.version('transformers')} does not know"
        f" (nearest: {', '.join(near) or 'none'}).{own} Update transformers, or give a copy of the"
        " model that was converted to an architecture it knows."
    )


def adaptable(model: Any) -> tuple[str, ...]:
    """Return the modules that "all-linear" adapts: linear layers and Conv1D, but not the head.

    As PEFT's own rule, but without what it would fail on (`_MAMBA_TYPES`, `_NOT_LINEAR`), and
    without towers for images and sound, which text never passes.
    """
    return tuple(name for name, _ in _linear_modules(model))


def has_towers(model: Any) -> bool:
    """Return whether a model has parts for images or sound beside its language model."""
    return _text_modules(model) is not None


def _linear_modules(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() or score_head(model)
    inside = _text_modules(model)
    mamba = model.config.model_type in _MAMBA_TYPES
    for name, module in model.named_modules():
        if module is head or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        if mamba and name.rpartition(".")[2] in _MAMBA_MODULES:
            continue
        if type(module).__name__.endswith(_NOT_LINEAR):
            continue
        if inside is None or module in inside:
            yield name, module


def _text_modules(model: Any) -> set[torch.nn.Module] | None:
    """Return the language model's modules; None when there is nothing beside it."""
    if model.config.get_text_config(decoder=True) is model.config:
        return None
    decoder = model.get_decoder()
    return None if decoder is None or decoder is model else set(decoder.modules())


def config_sizes(text: Any) -> Sizes:
    """Return the sizes of a language model's configuration object."""

    def get(name: str) -> Any:
        try:
            return getattr(text, name, None)
        except Exception:  # transformers 5.23 has no one value for what differs between layers
            return text.to_dict().get(name)

    return read_sizes(get)


def describe(model: Any) -> Structure:
    """Return the structure of a model of transformers, on any device."""
    import torch

    text = model.config.get_text_config(decoder=True)
    sizes = config_sizes(text)
    linears = tuple(LinearShape(name, *_out_in(module)) for name, module in _linear_modules(model))
    kinds = _kinds(model, sizes.experts)
    parameters = dict(model.named_parameters())
    count = {kind: 0 for kind in ("embedding", "head", "expert")}
    for name, kind in kinds.items():
        if kind in count:
            count[kind] += parameters[name].numel()
    experts = [parameters[name] for name, kind in kinds.items() if kind == "expert"]
    fused = max((each.shape[0] for each in experts if each.ndim == 3), default=0)
    total = sum(each.numel() for each in parameters.values())
    dtype = str(getattr(text, "dtype", None) or model.config.dtype or torch.float32)
    facts = ModelFacts(
        path="",
        model_type=str(model.config.model_type),
        parameters=total,
        weight_bytes=total * (4 if dtype == "torch.float32" else 2),
        dtype=_DTYPES.get(dtype, "BF16"),
        layers=sizes.layers,
        hidden_size=sizes.hidden_size,
        attention_heads=sizes.attention_heads,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_position_embeddings,
        linears=linears,
        architecture=type(model).__name__,
        key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        tied_embeddings=_is_tied(model),
        embedding_parameters=count["embedding"],
        head_parameters=count["head"],
        expert_parameters=count["expert"],
        experts=(sizes.experts or fused) if experts else 0,
        experts_per_token=sizes.experts_per_token if experts else 0,
        source="trace",
    )
    return Structure(facts, kinds, frozenset(name for name, _ in model.named_buffers()))


def _is_tied(model: Any) -> bool:
    import torch

    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = [each.weight for each in model.modules() if isinstance(each, torch.nn.Embedding)]
    return head is not None and any(each is head for each in tables)


def _out_in(module: Any) -> tuple[int, int]:
    if hasattr(module, "nf"):  # Conv1D keeps its weight as (in, out)
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def _kinds(model: Any, experts: int) -> dict[str, str]:
    import torch

    # named_parameters() yields a shared weight once, under the first of its names.
    kinds = {name: "other" for name, _ in model.named_parameters()}
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in _linear_modules(model):
        if f"{name}.weight" in kinds:
            kinds[f"{name}.weight"] = "conv1d" if hasattr(module, "nf") else "linear"
    head = model.get_output_embeddings()
    if head is not None:
        for parameter in head.parameters():
            kinds[named[id(parameter)]] = "head"
    for name, parameter in model.named_parameters():
        stacked = experts > 1 and parameter.ndim == 3 and parameter.shape[0] == experts
        if is_expert(name) or stacked:
            kinds[name] = "expert"
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and id(module.weight) in named:
            kinds[named[id(module.weight)]] = "embedding"
    return kinds
