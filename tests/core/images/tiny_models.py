"""Image-text chat models with random weights, as their checkpoints lie on disk: 2 MB each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MINIMIND = Path(__file__).resolve().parents[2] / "data" / "tokenizers" / "minimind"
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PIXELS: dict[str, Any] = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4}
# As the checkpoints' own write a turn, shortened to what the tests need.
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ 'MARK' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QWEN = _CHATML.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>")
_INTERNVL = _CHATML.replace("MARK", "<IMG_CONTEXT>\\n")
# LLaVA 1.5 reads lists of parts alone: images first, then text. Its own ends no turn.
_LLAVA = (
    "{% for message in messages %}{{ message.role.upper() + ':\\n' }}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}{% if message.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:\\n' }}{% endif %}"
)


def qwen2_vl(path: Path) -> None:
    """Save a Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    _qwen(path, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision)


def qwen2_5_vl(path: Path) -> None:
    """Save a Qwen2.5-VL, which attends in windows."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
        "intermediate_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    _qwen(path, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, vision)


def qwen3_vl(path: Path) -> None:
    """Save a Qwen3-VL, whose first layer gets features of the tower's first."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 14,
        "intermediate_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    _qwen(path, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, vision)


def internvl(path: Path) -> None:
    """Save an InternVL, which cuts large images into tiles."""
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
    )

    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(marks)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": [28, 28], "patch_size": [7, 7],
        },
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **_TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )  # fmt: skip
    reader = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, min_patches=1, max_patches=4, crop_to_patches=True
    )
    processor = still_images(InternVLProcessor)(
        reader, tokenizer, None, image_seq_length=4, chat_template=_INTERNVL
    )
    _save(path, InternVLForConditionalGeneration, config, processor)


def llava(path: Path) -> None:
    """Save a LLaVA 1.5: a tower of CLIP, a projector and a Llama."""
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer({"image_token": "<image>"})
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **_TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    untyped: Any = LlavaProcessor
    processor = untyped(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA,
    )
    _save(path, LlavaForConditionalGeneration, config, processor)


FAMILIES: Mapping[str, Callable[[Path], None]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "llava": llava,
}


def still_images(kind: Any) -> Any:
    """Return a processor's class without its part for video, which needs torchvision."""

    class Still(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [each for each in super().get_attributes() if "video" not in each]

    Still.__name__ = kind.__name__  # it is saved with the processor
    return Still


def _qwen(path: Path, config: Any, model: Any, processor: Any, vision: dict[str, Any]) -> None:
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = _tokenizer({}, ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                                "<|video_pad|>"))  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    made = config(
        text_config={
            "vocab_size": len(tokenizer),
            "head_dim": 16,
            "rope_parameters": rope,
            **_TEXT,
        },
        vision_config={"patch_size": 14, "spatial_merge_size": 2, **vision},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    reader = Qwen2VLImageProcessorPil(**_PIXELS)
    _save(path, model, made, still_images(processor)(reader, tokenizer, None, chat_template=_QWEN))


def _tokenizer(named: dict[str, str], others: tuple[str, ...] = ()) -> Any:
    from transformers import AutoTokenizer

    found: Any = AutoTokenizer
    tokenizer = found.from_pretrained(MINIMIND, extra_special_tokens=named)
    tokenizer.add_tokens([*named.values(), *others], special_tokens=True)
    tokenizer.chat_template = None
    return tokenizer


def _save(path: Path, model: Any, config: Any, processor: Any) -> None:
    import torch

    torch.manual_seed(0)
    made = model(config)
    with torch.no_grad():
        # The head is frozen under adapters: as it is drawn, its logits are too alike to be sure
        # of any answer.
        made.get_input_embeddings().weight.mul_(25)
    made.save_pretrained(path)
    processor.save_pretrained(path)
