"""Which tokens of a model are special, and which of them end an assistant turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.errors import ModelError

# Ends of a turn, for base models whose files name only the end of a document. In order: ChatML
# (Qwen, SmolLM, MiniMind, InternLM), Llama 3, Llama 4, Gemma 2 and 3, Phi 3 and 4, Command R.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
)


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by name and by use.

    Attributes:
        named: "bos_token", "eos_token" … to their text, as transformers hands them to a template.
        stop: texts after which a model stops: first the ones its files declare, then the
            end-of-turn tokens of known families that its vocabulary has.
        pad: text of the padding token, where there is one.
    """

    named: Mapping[str, str]
    stop: tuple[str, ...]
    pad: str | None


def special_tokens(model_dir: Path) -> SpecialTokens:
    """Read the special tokens of a model directory; files that are not there add nothing.

    Raises:
        ModelError: when one of its JSON files is malformed.
    """
    config = read_json(model_dir / "tokenizer_config.json")
    added = _added_tokens(model_dir, config)
    # transformers reads the older special_tokens_map.json only where the config lists no added
    # tokens, and then lets it win.
    if "added_tokens_decoder" not in config:
        config = {**config, **read_json(model_dir / "special_tokens_map.json")}
    named = {
        key: text
        for key, value in config.items()
        if key.endswith("_token") and (text := _token_text(value)) is not None
    }
    generation = read_json(model_dir / "generation_config.json")
    model = read_json(model_dir / "config.json")
    configs = (generation, model, model.get("text_config") or {})
    declared = _declared(configs, "eos_token_id", added)
    if "eos_token" not in named and declared:
        named["eos_token"] = declared[0]
    ends = [text for text in TURN_ENDS if text in added.values()]
    stop = tuple(dict.fromkeys([*filter(None, [named.get("eos_token")]), *declared, *ends]))
    pads = [*filter(None, [named.get("pad_token")]), *_declared(configs, "pad_token_id", added)]
    return SpecialTokens(named, stop, pads[0] if pads else None)


def is_token(model_dir: Path, text: str) -> bool:
    """Return whether a text is one token of a model's vocabulary."""
    tokenizer = read_json(model_dir / "tokenizer.json")
    added = _added_tokens(model_dir, read_json(model_dir / "tokenizer_config.json"))
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    # Unigram models list their tokens with a score each.
    return text in added.values() or text in (
        vocabulary if isinstance(vocabulary, dict) else {each[0] for each in vocabulary}
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a model's JSON file, or {} when the file is not there.

    Raises:
        ModelError: when it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ModelError(
            f"{path} must be a JSON object, but it cannot be parsed ({reason}). "
            "Copy the model again from where it came."
        ) from None
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} must be a JSON object, found a {type(value).__name__}. "
            "Copy the model again from where it came."
        )
    return value


def _added_tokens(model_dir: Path, config: Mapping[str, Any]) -> dict[int, str]:
    listed = read_json(model_dir / "tokenizer.json").get("added_tokens") or []
    added = {int(token["id"]): str(token["content"]) for token in listed}
    for key, value in (config.get("added_tokens_decoder") or {}).items():
        text = _token_text(value)
        if text is not None:
            added.setdefault(int(key), text)
    return added


def _token_text(value: object) -> str | None:
    """Return the text of a token that is written as a string or as an AddedToken object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _declared(
    configs: tuple[Mapping[str, Any], ...], key: str, added: Mapping[int, str]
) -> list[str]:
    texts = []
    for config in configs:
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token in added:
                texts.append(added[token])
    return texts
