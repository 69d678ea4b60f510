from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mst.data.tokens import load_tokenizer

Refuses = Callable[..., str]


@pytest.fixture
def model(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the minimind tokenizer whose config says nothing."""
    shutil.copy(model_dirs["minimind"] / "tokenizer.json", tmp_path)
    return tmp_path


def write(path: Path, **value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("family", ["minimind", "qwen3"])
def test_special_tokens_and_size_are_those_of_transformers(
    family: str, model_dirs: dict[str, Path]
) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(model_dirs[family])
    ours = load_tokenizer(model_dirs[family])

    assert ours.eos_token_ids[0] == theirs.eos_token_id
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)


def test_offsets_are_characters_of_the_text(model_dirs: dict[str, Path]) -> None:
    text = "<|im_start|>user\n你好 world"
    tokenizer = load_tokenizer(model_dirs["minimind"])
    encoded = tokenizer.encode(text)

    assert tokenizer.decode(encoded.ids) == text
    assert encoded.offsets[0] == (0, len("<|im_start|>"))
    assert encoded.offsets[-1][1] == len(text)
    assert "你好" not in repr(encoded)


def test_a_file_that_cuts_or_pads_does_neither(model: Path) -> None:
    path = model / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    whole["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path.write_text(json.dumps(whole))

    short, long = load_tokenizer(model).encode_batch(["a", "a b c d e f g h i j k"])

    assert len(short.ids) == 1
    assert len(long.ids) > 4


def test_the_ends_of_all_files_are_gathered_and_padding_falls_back_on_the_first(
    model: Path,
) -> None:
    write(model / "config.json", eos_token_id=0)
    write(model / "generation_config.json", eos_token_id=[2, 0])

    found = load_tokenizer(model)

    assert found.eos_token_ids == (2, 0)
    assert found.pad_token_id == 2


def test_a_base_model_also_stops_at_the_end_of_a_turn_that_it_knows(model: Path) -> None:
    write(model / "tokenizer_config.json", eos_token="<|endoftext|>")

    assert load_tokenizer(model).eos_token_ids == (0, 2)


def test_tokens_that_only_the_config_lists_are_added(model: Path) -> None:
    size = load_tokenizer(model).vocab_size
    token = {"content": "<new>", "special": True, "normalized": False}
    config = model / "tokenizer_config.json"
    write(config, eos_token="<new>", added_tokens_decoder={str(size): token})

    found = load_tokenizer(model)

    assert found.eos_token_ids[0] == size
    assert found.vocab_size == size + 1
    assert found.encode("a<new>").ids[-1] == size


def test_a_missing_or_broken_file_is_named_with_what_to_do(
    model: Path, tmp_path: Path, refuses: Refuses
) -> None:
    write(model / "tokenizer_config.json", added_tokens_decoder={"9": {"content": "<|im_end|>"}})
    refuses(lambda: load_tokenizer(model), "'<|im_end|>' the id 9", "it is 2")
    (model / "tokenizer_config.json").write_text("{")
    refuses(lambda: load_tokenizer(model), "tokenizer_config.json", "cannot be parsed")
    (model / "tokenizer_config.json").write_text("[]")
    refuses(lambda: load_tokenizer(model), "tokenizer_config.json", "found a list")
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    refuses(lambda: load_tokenizer(model), "tokenizer.json", "cannot be read")
    (model / "tokenizer.json").unlink()
    refuses(lambda: load_tokenizer(model), "no ", "tokenizer.json", "save_pretrained")


def test_a_tokenizer_without_an_end_is_refused(model: Path, refuses: Refuses) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|other|>"))

    refuses(lambda: load_tokenizer(model), "end-of-sequence", "never stop", "'eos_token_id'")
