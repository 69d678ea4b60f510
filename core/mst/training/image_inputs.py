"""The tensors of a micro-batch's images, loaded when the batch is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import DataError
from mst.model.processor import image_tensors, image_token_id

if TYPE_CHECKING:
    import torch

    from mst.data.encode import Example

# 1 where a token stands for a part of an image; models with positions in three dimensions ask.
TYPES = "mm_token_type_ids"


def image_inputs(
    examples: Sequence[Example], input_ids: torch.Tensor, processor: Path | None
) -> dict[str, torch.Tensor]:
    """Return what the forward pass takes beside the text; {} where no row has an image.

    Args:
        examples: rows, one in each line.
        input_ids: (lines, width) of them, padded.
        processor: directory of the model's; None where images can't be read.

    Raises:
        DataError: an image has changed, or the row's text holds the token of an image itself.
    """
    if not any(each.images for each in examples):
        return {}
    if processor is None:
        row = next(each.row for each in examples if each.images)
        raise DataError(
            f"{row.file}, row {row.number}: the row has images, which are read by `mst train` with"
            " --task sft alone. Give rows without images."
        )
    token = image_token_id(processor)
    for each in examples:
        if token in each.input_ids and not each.images:
            raise DataError(
                f"{each.row.file}, row {each.row.number}: the row has no image, but its text holds"
                " the token that stands for one. Mend the row."
            )
    try:
        found = image_tensors(processor, [image for each in examples for image in each.images])
    except DataError as error:
        where = sorted({f"{each.row.file}, row {each.row.number}" for each in examples})
        raise DataError(f"{error} It is an image of one of: {'; '.join(where)}.") from None
    return {**found, TYPES: (input_ids == token).long()}
