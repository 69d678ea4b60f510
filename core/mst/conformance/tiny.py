"""A tiny Llama with random weights, its tokenizer and rows to train on, made on the spot."""

from __future__ import annotations

import array
import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS = 64, 128, 2, 4, 2
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SUBJECTS = ("card", "cash", "fee", "loan")
_DETAILS = ("is late", "was lost", "looks wrong", "went up twice this year")


def tiny_model(workspace: Path, key_value_heads: int = KEY_VALUE_HEADS) -> Path:
    """Return the model's directory; makes it at the first call."""
    path = workspace / "tiny-llama"
    if not (path / "config.json").exists():
        path.mkdir(exist_ok=True)
        vocabulary = _write_tokenizer(path)
        _write_weights(path, vocabulary, key_value_heads)
        # Last: a directory with a config is whole.
        _write_json(path / "config.json", _config(vocabulary, key_value_heads))
    return path


def tiny_rows(workspace: Path) -> Path:
    """Return a file of sixteen conversations; writes it at the first call."""
    path = workspace / "rows.jsonl"
    if not path.exists():
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"my {subject} {detail}"},
                    {"role": "assistant", "content": f"ask the {subject} desk"},
                ]
            }
            for detail in _DETAILS
            for subject in _SUBJECTS
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plan_arguments(workspace: Path, device: str, dtype: str) -> list[str]:
    """Return the options that `mst plan` and `mst train` share here."""
    options = {
        "--model": tiny_model(workspace), "--dataset": tiny_rows(workspace), "--device": device,
        "--dtype": dtype, "--tuner": "lora", "--max-steps": 4, "--val-size": 0,
        "--per-device-train-batch-size": 4, "--gradient-accumulation-steps": 1,
        "--learning-rate": 0.001, "--lr-scheduler-type": "constant", "--label-accuracy": "off",
        "--gradient-checkpointing": "off", "--save-steps": 2, "--logging-steps": 1,
        # Where there are several, the plan would take them all, and a larger global batch.
        "--nproc-per-node": 1,
    }  # fmt: skip
    return [text for name, value in options.items() for text in (name, str(value))]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _config(vocabulary: int, key_value_heads: int) -> Mapping[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _write_tokenizer(path: Path) -> int:
    """Write a tokenizer of bytes and three special tokens; return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(_SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": _TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", config)
    return len(vocabulary)


def _write_weights(path: Path, vocabulary: int, key_value_heads: int) -> None:
    """Write the weights as safetensors: the length of the header, the header, the numbers.

    Source: https://github.com/huggingface/safetensors#format
    """
    numbers = random.Random(0)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = array.array("f")
    for name, shape in _shapes(vocabulary, key_value_heads).items():
        begin = len(data) * data.itemsize
        if len(shape) == 1:
            data.extend([1.0] * shape[0])
        else:
            data.extend(numbers.gauss(0, 0.05) for _ in range(shape[0] * shape[1]))
        offsets = [begin, len(data) * data.itemsize]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + data.tobytes()
    (path / "model.safetensors").write_bytes(weights)


def _shapes(vocabulary: int, key_value_heads: int) -> dict[str, tuple[int, ...]]:
    """Return transformers' names of a Llama's weights, to their shapes."""
    narrow = HIDDEN * key_value_heads // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        block = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (narrow, HIDDEN),
            "self_attn.v_proj": (narrow, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes
