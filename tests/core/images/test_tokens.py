"""Rows with images are encoded as the models' own processors encode them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.images.conftest import COLOURS, asked
from tests.core.images.tiny_models import FAMILIES, still_images

from mst.data.encode import IGNORE, encode
from mst.data.formats import read
from mst.data.template import load_template
from mst.data.tokens import load_tokenizer
from mst.errors import DataError, ModelError
from mst.model.processor import image_mark

Find = Callable[[str], Path]


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """A row of two questions, the first with two images, the second with one."""
    from PIL import Image

    for name, size in zip(COLOURS, ((90, 40), (30, 100), (56, 56)), strict=False):
        Image.new("RGB", size, COLOURS[name]).save(tmp_path / f"{name}.png")
    turns = [
        {"role": "system", "content": "Name colours."},
        {"role": "user", "content": "<image>which, and <image>?"},
        {"role": "assistant", "content": "red, then green"},
        {"role": "user", "content": "and <image>"},
        {"role": "assistant", "content": "blue"},
    ]
    path = tmp_path / "talk.jsonl"
    row = {"messages": turns, "images": ["red.png", "green.png", "blue.png"]}
    path.write_text(json.dumps(row) + "\n")
    return path


def processor_of(directory: Path, family: str) -> Any:
    """Return the model's own processor."""
    import transformers
    from transformers.models.auto import processing_auto

    names: Any = processing_auto
    kind = getattr(transformers, names.PROCESSOR_MAPPING_NAMES[family])
    return still_images(kind).from_pretrained(directory)


def as_transformers(talk: Path) -> list[dict[str, Any]]:
    """Return the row's conversation as `apply_chat_template` takes it."""
    row = json.loads(talk.read_text())
    images = iter(row["images"])
    turns = []
    for turn in row["messages"]:
        parts: list[dict[str, str]] = []
        for number, text in enumerate(turn["content"].split("<image>")):
            if number:
                parts.append({"type": "image", "path": str(talk.parent / next(images))})
            if text:
                parts.append({"type": "text", "text": text})
        turns.append({"role": turn["role"], "content": parts})
    return turns


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_models_own_processor(
    vision_model: Find, family: str, talk: Path
) -> None:
    directory = vision_model(family)
    tokenizer, template = load_tokenizer(directory), load_template(directory)
    found = encode(read([str(talk)]).rows, tokenizer, template, None).examples[0]
    expected = processor_of(directory, family).apply_chat_template(
        as_transformers(talk), tokenize=True, return_dict=True
    )

    assert list(found.input_ids) == list(expected["input_ids"][0])
    learned = [token for token, label in zip(found.input_ids, found.labels, strict=True)
               if label != IGNORE]  # fmt: skip
    assert tokenizer.decode(learned) == "red, then green<|im_end|>blue<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_of_an_image_is_learned_even_from_the_whole_text(
    vision_model: Find, family: str, talk: Path
) -> None:
    directory = vision_model(family)
    tokenizer, template = load_tokenizer(directory), load_template(directory)
    rows = read([str(talk)]).rows
    found = encode(rows, tokenizer, template, None, train_on="all").examples[0]
    token = processor_of(directory, family).image_token_id
    seen = [at for at, each in enumerate(found.input_ids) if each == token]

    assert len(seen) > 3
    assert {found.labels[at] for at in seen} == {IGNORE}
    others = [at for at in range(1, len(found.labels)) if at not in seen]
    unlearned = [at for at in others if found.labels[at] == IGNORE]
    # InternVL puts a token before and after each image's.
    assert len(unlearned) == (6 if family == "internvl" else 0)


def test_a_row_with_images_is_left_out_whole_when_it_is_too_long(
    vision_model: Find, talk: Path, squares: Path
) -> None:
    directory = vision_model("llava")
    tokenizer, template = load_tokenizer(directory), load_template(directory)
    rows = (*read([str(talk)]).rows, *read([str(squares)]).rows)
    for strategy in ("delete", "right", "left"):
        found = encode(rows, tokenizer, template, 60, truncation_strategy=strategy)

        assert (len(found.examples), found.stats.deleted, found.stats.truncated) == (48, 1, 0)


def test_a_model_without_a_processor_refuses_images(tiny_model: Path, squares: Path) -> None:
    rows = read([str(squares)]).rows
    with pytest.raises(DataError, match=r"row 1: the row has images, but .* reads text alone"):
        encode(rows, load_tokenizer(tiny_model), load_template(tiny_model), None)


def test_a_family_that_is_not_compared_with_transformers_is_refused(
    vision_model: Find, squares: Path, tmp_path: Path
) -> None:
    import shutil

    directory = tmp_path / "model"
    shutil.copytree(vision_model("llava"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "llava_next"}))
    with pytest.raises(ModelError, match=r"'llava_next'.*qwen2_vl"):
        encode(read([str(squares)]).rows, load_tokenizer(directory), load_template(directory), None)


def test_text_that_holds_the_mark_of_an_image_is_refused(vision_model: Find, squares: Path) -> None:
    directory = vision_model("qwen2_vl")
    path = squares.parent / "forged.jsonl"
    forged = asked("<|image_pad|> <image>", "red") | {"images": ["0.png"]}
    path.write_text(json.dumps(forged) + "\n")
    with pytest.raises(DataError, match=r"row 1: the row has 1 images, but .* writes 2 marks"):
        encode(read([str(path)]).rows, load_tokenizer(directory), load_template(directory), None)


def test_an_image_that_the_processor_refuses_is_named(vision_model: Find, squares: Path) -> None:
    from PIL import Image

    directory = vision_model("qwen2_vl")
    Image.new("RGB", (1000, 2)).save(squares.parent / "stripe.png")
    path = squares.parent / "stripe.jsonl"
    path.write_text(json.dumps(asked("q", "a") | {"images": ["stripe.png"]}) + "\n")
    with pytest.raises(DataError, match=r"row 1: the model's processor refuses .* 1000 × 2"):
        encode(read([str(path)]).rows, load_tokenizer(directory), load_template(directory), None)


def test_the_template_of_an_older_processor_is_found(vision_model: Find, tmp_path: Path) -> None:
    import shutil

    directory = tmp_path / "model"
    shutil.copytree(vision_model("qwen2_vl"), directory)
    source = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": source}))

    assert load_template(directory).source == source


def test_code_that_comes_with_a_processor_is_not_run(vision_model: Find, tmp_path: Path) -> None:
    model = shutil.copytree(vision_model("llava"), tmp_path / "model")
    (model / "code_x.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    own = {
        "AutoProcessor": "code_x.X", "AutoImageProcessor": "code_x.X",
        "AutoTokenizer": ["code_x.X", "code_x.X"],
    }  # fmt: skip
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = model / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        if isinstance(known.get("image_processor"), dict):
            known["image_processor"]["auto_map"] = own
        path.write_text(json.dumps(known | {"auto_map": own}))

    assert image_mark(model) == "<image>"
    assert not (tmp_path / "marker").exists()
