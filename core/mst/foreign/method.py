"""What is trained and how it is laid out: adapters, quantized weights, attention, ZeRO."""

from __future__ import annotations

import json
import re
from typing import Any

from mst.foreign.draft import Draft, number, truth, words

_ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "eager": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "flash_attn": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "flash_attention_3": "flash_attention_3",
    "flex": "flex_attention",
    "flex_attention": "flex_attention",
}


def attention(draft: Draft, value: Any, key: str) -> None:
    """Translate the implementation of attention."""
    if value is not None and str(value) in _ATTENTION:
        draft.keep("attn_implementation", _ATTENTION[str(value)], key)
    elif value is not None:
        draft.drop(key, "not one of transformers' own; mst takes what the backend is best at")


def tuner(draft: Draft, kind: str | None, key: str) -> None:
    """Translate the method: lora, or full; quantized weights make qlora of it afterwards."""
    if kind is None:
        return
    if kind in ("lora", "qlora", "full"):
        draft.keep("tuner", kind, key)
    else:
        draft.drop(key, "mst trains LoRA adapters or all weights", "changes", "tuner")


def quantized(draft: Draft, bits: Any, key: str) -> None:
    """Translate weights that are quantized while they are loaded."""
    if bits is None:
        return
    if draft.options.get("tuner") == "full":
        draft.drop(key, "quantized weights can't be trained as a whole", "changes")
        return
    if number(bits) in (4, 8) and draft.keep("quant_bits", int(number(bits) or 4), key):
        draft.options.pop("tuner", None)
        draft.written = [each for each in draft.written if each.name != "tuner"]
        draft.keep("tuner", "qlora", key, "adapters on quantized weights")
    elif number(bits) not in (4, 8):
        draft.drop(key, "mst quantizes to 4 or 8 bits", "changes")


def targets(draft: Draft, value: Any, key: str) -> None:
    """Translate which layers get an adapter; a regular expression is not carried over."""
    if value is None:
        return
    names = words(value)
    if names in (["all"], ["all-linear"], ["all_linear"], ["ALL"]):
        draft.keep("target_modules", ["all-linear"], key)
    elif any(re.search(r"[*^$()|\\]", each) for each in names):
        draft.drop(key, "mst takes names of layers, no patterns", "changes")
    else:
        draft.keep("target_modules", names, key)


def targets_of_peft(draft: Draft, key: str) -> None:
    """Report that layers were not named, where PEFT would have chosen them."""
    why = "not given: theirs are PEFT's for the architecture, mst's are all linear layers"
    draft.drop(key, why, "changes")


def loaded_in(draft: Draft) -> int | None:
    """Translate `load_in_4bit` and `load_in_8bit`; return the bits, None where neither is true."""
    four, eight = truth(draft.take("load_in_4bit")), truth(draft.take("load_in_8bit"))
    bits = 4 if four else 8 if eight else None
    quantized(draft, bits, f"load_in_{bits}bit")
    return bits


def zero(draft: Draft, value: Any, key: str) -> None:
    """Translate a stage of DeepSpeed's ZeRO, from a name, a file or its contents."""
    if value in (None, False, "false", ""):
        return
    found = value if isinstance(value, dict) else _file(draft, str(value))
    stage = _stage(found) if found is not None else named_stage(str(value))
    if stage is None:
        draft.drop(key, "names no stage of ZeRO; set deepspeed to one", "check")
    else:
        note = "mst makes the rest of DeepSpeed's configuration itself"
        draft.keep("deepspeed", stage, key, note)


def _file(draft: Draft, text: str) -> dict[str, Any] | None:
    path = draft.path(text)
    try:
        # A DeepSpeed configuration has a few KB.
        if not path.is_file() or path.suffix != ".json" or path.stat().st_size > 1 << 20:
            return None
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _stage(found: dict[str, Any]) -> str | None:
    cut = found.get("zero_optimization")
    stage = cut.get("stage", 0) if isinstance(cut, dict) else 0
    if not isinstance(cut, dict) or stage == 0:
        return "off"
    if stage not in (1, 2, 3):
        return None
    away = [cut.get(part) for part in ("offload_optimizer", "offload_param")]
    offload = any(
        isinstance(each, dict) and each.get("device") not in (None, "none") for each in away
    )
    return f"zero{stage}" + ("_offload" if offload and stage > 1 else "")


def named_stage(text: str) -> str | None:
    """Return the stage that a name tells: zero3, ds_z2_offload_config.json, zero3_bf16.json."""
    match = re.search(r"z(?:ero)?_?([0-3])", text.rsplit("/", 1)[-1].lower())
    if match is None:
        return None
    stage = int(match[1])
    offload = "_offload" if "offload" in text and stage > 1 else ""
    return f"zero{stage}{offload}" if stage else "off"
