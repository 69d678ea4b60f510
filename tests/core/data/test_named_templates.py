"""Templates by name: they write what the families' own do, for models that have their tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mst.data.named_templates import NAMED
from mst.data.rows import Message
from mst.data.spans import assistant_spans
from mst.data.template import ChatTemplate, load_template, render
from mst.errors import ModelError

TALK = (
    Message("user", "2 + 2?"),
    Message("assistant", "4"),
    Message("user", "好的"),
    Message("assistant", "再见"),
)
SYSTEM = Message("system", "Be brief.")
# Their own template, and whether it takes a system's turn. Qwen's adds one of its own without it.
OWN = {
    "chatml": ("qwen2_5", True), "llama3": ("llama3", True), "gemma": ("gemma", False),
    "phi3": ("phi3", True),
}  # fmt: skip


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_it_writes_what_the_family_writes(name: str, prompt: bool) -> None:
    trl = pytest.importorskip("trl", reason="its chat templates are the oracle")
    file, system = OWN[name]
    theirs = (Path(trl.__file__).parent / f"chat_templates/{file}.jinja").read_text("utf-8")
    tokens = {"bos_token": "<s>", "eos_token": ""}
    talk = ((SYSTEM, *TALK) if system else TALK)[: -1 if prompt else None]
    expected, found = (
        render(ChatTemplate(source, tokens, (), "x"), talk, prompt)
        for source in (theirs, NAMED[name][0])
    )

    assert found == expected


@pytest.mark.parametrize("name", NAMED)
def test_answers_and_their_ends_are_learnt(name: str) -> None:
    source, end = NAMED[name]
    template = ChatTemplate(source, {"bos_token": "<s>"}, (end,), name)
    text, spans = assistant_spans(template, (SYSTEM, *TALK), "assistant")

    assert [text[each.start : each.end] for each in spans] == [f"4{end}", f"再见{end}"]
    assert text.count("Be brief.") == 1


def test_a_model_without_the_end_of_turn_token_is_refused(tiny_model: Path) -> None:
    assert load_template(tiny_model, "chatml").origin == "mst's template chatml"
    with pytest.raises(ModelError, match=r"llama3 ends its turns with <\|eot_id\|>.*never learn"):
        load_template(tiny_model, "llama3")


def test_an_end_of_turn_that_only_the_config_names_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    for each in tiny_model.iterdir():
        shutil.copy(each, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"eos_token": "<|eot_id|>"}
    path.write_text(json.dumps(config), "utf-8")

    with pytest.raises(ModelError, match=r"llama3 ends its turns with <\|eot_id\|>"):
        load_template(tmp_path, "llama3")


def test_an_unknown_name_names_the_nearest(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"known: chatml.*Did you mean chatml\?"):
        load_template(tiny_model, "chat-ml")


def test_one_of_the_models_own_is_taken_by_name(tiny_model: Path, tmp_path: Path) -> None:
    for each in tiny_model.iterdir():
        shutil.copy(each, tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["chat_template"] = [
        {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    path.write_text(json.dumps(config), "utf-8")

    assert load_template(tmp_path, "rag").source == "R"
    with pytest.raises(ModelError, match=r"\(rag, tool_use\).*Pass the name"):
        load_template(tmp_path)
