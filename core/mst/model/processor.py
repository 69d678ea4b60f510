"""A model's own processor: how many tokens an image is, and the tensors that the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.data.images import Image, open_image, require_pillow
from mst.data.special import read_json
from mst.errors import DataError, ModelError
from mst.model.files import read_config

if TYPE_CHECKING:
    import torch

# Families whose tokens and losses are compared with transformers' own in the tests.
FAMILIES = ("internvl", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
# Every file that may be part of a processor, copied beside weights that are to stand alone.
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "chat_template.json",
)  # fmt: skip
# What a processor says of the text, which is encoded without it.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class ImageTokens:
    """What an image of some size becomes.

    Attributes:
        text: its tokens as text.
        tensor_bytes: of the tensors that the model sees it by.
    """

    text: str = field(repr=False)
    tensor_bytes: int


def has_processor(directory: Path) -> bool:
    """Return whether a model directory has a processor of images."""
    return any((directory / name).is_file() for name in PROCESSOR_FILES[:2])


def image_mark(directory: Path) -> str:
    """Return the token that the model's chat template writes for an image."""
    return str(_processor(directory).image_token)


def image_token_id(directory: Path) -> int:
    """Return the id of the token in whose place the model puts what it sees of an image."""
    return int(_processor(directory).image_token_id)


@lru_cache(maxsize=65536)
def image_tokens(directory: Path, width: int, height: int) -> ImageTokens:
    """Return what an image of so many pixels becomes; it depends on nothing else of it.

    Raises:
        DataError: the processor refuses such an image. Does not say which row it was.
        ModelError: the processor can't be used.
    """
    from PIL import Image as pillow

    processor = _processor(directory)
    try:
        found = _processed(processor, [pillow.new("RGB", (width, height))])
    except ValueError as error:
        raise DataError(
            f"the model's processor refuses an image of {width} × {height} pixels:"
            f" {str(error)[:200]}. Change its size, or remove the row."
        ) from None
    ids = found["input_ids"][0].tolist()
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    if processor.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        raise ModelError(
            f"the processor in {directory} writes an image as tokens that are no text of its"
            " tokenizer. Copy the model again from where it came."
        )
    tensors = [value for name, value in found.items() if name not in _OF_TEXT]
    return ImageTokens(text, sum(each.numel() * each.element_size() for each in tensors))


def image_tensors(directory: Path, images: Sequence[Image]) -> dict[str, torch.Tensor]:
    """Return what the model sees images by, as arguments of its forward pass.

    Args:
        directory: the model's.
        images: those of a micro-batch, in their order.

    Raises:
        DataError: one is not what it was when the rows were read.
    """
    found = _processed(_processor(directory), [open_image(each) for each in images])
    return {name: value for name, value in found.items() if name not in _OF_TEXT}


def _processed(processor: Any, pictures: Sequence[Any]) -> Any:
    return processor(
        text=[processor.image_token * len(pictures)],
        images=list(pictures),
        return_tensors="pt",
        add_special_tokens=False,
    )


@lru_cache(maxsize=2)
def _processor(directory: Path) -> Any:
    """Return the processor of a model directory.

    Raises:
        ModelError: its kind is unknown, or it can't be loaded.
        MstError: Pillow is not installed.
    """
    require_pillow()
    import transformers
    from transformers.models.auto import processing_auto

    kind = read_config(directory).get("model_type")
    names: Any = processing_auto
    name = names.PROCESSOR_MAPPING_NAMES.get(kind)
    if kind not in FAMILIES or _named(directory) not in (None, name):
        raise ModelError(
            f"the data has images, but {directory} is of model_type {kind!r} with the processor"
            f" {_named(directory) or name or 'none'}; mst trains with images on"
            f" {', '.join(FAMILIES)} with their own. Give a model of one of these, or rows"
            " without images."
        )
    try:
        return _still(getattr(transformers, name)).from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the processor of images in {directory} can't be loaded: {lines[0][:300]}. Copy all"
            " of the model's files again from where it came."
        ) from None


def _named(directory: Path) -> str | None:
    """Return the processor's class that a model's files name."""
    for file in (*PROCESSOR_FILES[:2], "tokenizer_config.json"):
        name = read_json(directory / file).get("processor_class")
        if name:
            return str(name)
    return None


def _still(kind: Any) -> Any:
    """Return a processor's class without its part for video.

    That part needs torchvision, which has no build for every torch that mst runs with, and no row
    of ours has a video.
    """

    class Still(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [each for each in super().get_attributes() if "video" not in each]

    return Still
