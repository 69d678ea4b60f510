"""The losses of rows with images are those of transformers' own models and processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.images.conftest import COLOURS, SIZES
from tests.core.images.test_tokens import processor_of
from tests.core.images.tiny_models import FAMILIES

from mst.data.encode import encode
from mst.data.formats import read
from mst.data.template import ChatTemplate, load_template
from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.errors import DataError

Find = Callable[[str], Path]


def conversation(squares: Path, number: int) -> list[dict[str, Any]]:
    """Return a row's conversation as `apply_chat_template` takes it."""
    image = {"type": "image", "path": str(squares.parent / f"{number}.png")}
    answer = {"type": "text", "text": list(COLOURS)[number % 4]}
    question = {"type": "text", "text": "what colour?"}
    return [
        {"role": "user", "content": [image, question]},
        {"role": "assistant", "content": [answer]},
    ]


def loaded(directory: Path) -> tuple[Any, TextTokenizer, ChatTemplate]:
    """Return transformers' own model, and mst's tokenizer and template."""
    import torch
    from transformers import AutoModelForImageTextToText

    untyped: Any = AutoModelForImageTextToText
    model = untyped.from_pretrained(directory, dtype=torch.float32).eval()
    return model, load_tokenizer(directory), load_template(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_padded_batch_is_that_of_transformers_row_by_row(
    vision_model: Find, family: str, squares: Path
) -> None:
    import torch

    from mst.training.batches import collate
    from mst.training.loss import summed_loss

    directory = vision_model(family)
    model, tokenizer, template = loaded(directory)
    processor = processor_of(directory, family)
    # One of each size of images, so that rows of unlike lengths are padded.
    numbers = [4 * place for place in range(len(SIZES))]
    rows = [read([str(squares)]).rows[number] for number in numbers]
    examples = encode(rows, tokenizer, template, None).examples
    batch = collate(examples, tokenizer.pad_token_id, "padded", directory)
    expected, labels = 0.0, 0
    with torch.no_grad():
        found = float(summed_loss(model, batch, "kept"))
        for number, example in zip(numbers, examples, strict=True):
            inputs = processor.apply_chat_template(
                conversation(squares, number), tokenize=True, return_dict=True, return_tensors="pt"
            )
            wanted = torch.tensor([list(example.labels)])
            count = int((wanted != -100).sum())
            expected += float(model(**inputs, labels=wanted).loss) * count
            labels += count

    assert batch.label_tokens == labels
    assert abs(found - expected) / labels < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_changes_what_the_model_says(
    vision_model: Find, family: str, squares: Path
) -> None:
    import dataclasses

    import torch

    from mst.training.batches import collate
    from mst.training.loss import summed_loss

    directory = vision_model(family)
    model, tokenizer, template = loaded(directory)
    red, green = encode(read([str(squares)]).rows[:2], tokenizer, template, None).examples
    swapped = dataclasses.replace(red, images=green.images)
    with torch.no_grad():
        losses = [
            float(summed_loss(model, collate([each], 0, "padded", directory), "kept"))
            for each in (red, swapped, red)
        ]

    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_rows_with_and_without_images_share_a_batch(vision_model: Find, squares: Path) -> None:
    import json

    from tests.core.images.conftest import asked

    from mst.training.batches import collate
    from mst.training.loss import summed_loss

    path = squares.parent / "mixed.jsonl"
    text = asked("what colour is snow?", "white")
    path.write_text(squares.read_text().splitlines()[0] + "\n" + json.dumps(text) + "\n")
    for family in ("qwen2_vl", "llava"):
        directory = vision_model(family)
        model, tokenizer, template = loaded(directory)
        examples = encode(read([str(path)]).rows, tokenizer, template, None).examples

        def loss(chosen: Any, model: Any = model, directory: Path = directory) -> float:
            batch = collate(chosen, 0, "padded", directory)
            return float(summed_loss(model, batch, "kept").detach())

        assert loss(examples) == pytest.approx(sum(loss([each]) for each in examples), abs=2e-5)


def test_images_are_refused_where_they_would_not_be_seen(vision_model: Find, squares: Path) -> None:
    from mst.training.batches import collate

    directory = vision_model("llava")
    tokenizer, template = load_tokenizer(directory), load_template(directory)
    examples = encode(read([str(squares)]).rows[:1], tokenizer, template, None).examples
    with pytest.raises(DataError, match="row 1: the row has images"):
        collate(examples, 0, "padded")
