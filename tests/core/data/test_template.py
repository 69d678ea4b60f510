from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mst.data.rows import DataSet, Message
from mst.data.template import PLAIN_ORIGIN, ChatTemplate, load_template, render
from mst.data.tokens import load_tokenizer
from mst.errors import ModelError

SECRET = "Frau Müller 王小明 +49-151"
FAMILIES = ("minimind", "qwen3", "smollm2")
SYSTEM, USER, AGAIN = (
    Message("system", "简短。"),
    Message("user", "你好 <b>&"),
    Message("user", "?"),
)
ANSWER = Message("assistant", "您好！\n Hello, “you”. ")
CHATS = [
    (USER, ANSWER),
    (SYSTEM, USER, ANSWER),
    (USER, ANSWER, AGAIN, ANSWER),
    (SYSTEM, USER, ANSWER, AGAIN),
    (USER, Message("assistant", "<think>\nhm\n</think>\n\nja"), AGAIN, ANSWER),
    (USER, Message("assistant", "<think>\nhm\n</think>\n\nja")),
]


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "</s>"}, ("</s>",), "here.jinja")


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_ids_are_those_of_transformers(
    family: str, model_dirs: dict[str, Path], demo: DataSet, crosswoz: DataSet
) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(model_dirs[family])
    ours, loaded = load_template(model_dirs[family]), load_tokenizer(model_dirs[family])
    chats = [*CHATS, *(row.messages for row in (*demo.rows[:40], *crosswoz.rows))]

    for chat in chats:
        for prompt in (False, True):
            text = render(ours, chat, add_generation_prompt=prompt)
            expected = theirs.apply_chat_template(
                plain(chat), tokenize=False, add_generation_prompt=prompt
            )
            ids = theirs.apply_chat_template(
                plain(chat), tokenize=True, add_generation_prompt=prompt, return_dict=False
            )

            assert text == expected
            assert loaded.encode(text).ids == ids


def test_the_environment_is_that_of_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = """
    {%- set ns = namespace(n=0) %}
      {% for m in messages %}
        {%- if m.role == 'system' %}{% continue %}{% endif %}
        {%- set ns.n = ns.n + 1 %}
        {{ m | tojson }} {{ m | tojson(indent=2) }} {{ dict(a=1) }} {{ dict.fromkeys([1]) }}
        {% generation %}{{ m.content | trim }}{% endgeneration %}
        {% if ns.n == 2 %}{% break %}{% endif %}
      {% endfor %}
    {{ strftime_now('%Y') }} {{ tools is none }} {{ documents is none }} {{ eos_token }}
    """
    for chat in CHATS:
        theirs: Any = render_jinja_template([plain(chat)], chat_template=source, eos_token="</s>")

        assert render(template(source), chat) == theirs[0][0]


@pytest.mark.parametrize(
    ("source", "needles"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", ("Roles must alternate!",)),
        ("{{ raise_exception('Bad: ' + messages[0].content) }}", ("may hold the text",)),
        ("{{ messages[0].content.no.such }}", ("UndefinedError",)),
        ("{{ messages[0].content + 1 }}", ("TypeError",)),
        ("{{ messages[0].content | int(default=messages) + 'a' }}", ("TypeError",)),
        ("{{ messages.append(1) }}", ("SecurityError",)),
        ("{{ ''.__class__.__mro__ }}", ("SecurityError",)),
        ("{{ namespace(_x=1) }}", ("SecurityError",)),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", ("SecurityError",)),
    ],
)
def test_a_refusal_names_the_template_and_quotes_no_message(
    refuses: Callable[..., str], source: str, needles: tuple[str, ...]
) -> None:
    chat = [Message("user", SECRET), Message("assistant", SECRET)]

    refuses(lambda: render(template(source), chat), "here.jinja", "(user, assistant)", *needles)


def test_the_file_beside_the_model_comes_before_its_config(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    assert load_template(model_dirs["smollm2"]).origin.endswith("chat_template.jinja")
    assert load_template(model_dirs["minimind"]).origin.endswith("tokenizer_config.json")

    override = tmp_path / "mine.jinja"
    override.write_text("{{ messages[0].content }}{{ eos_token }}\n", encoding="utf-8")
    mine = load_template(model_dirs["smollm2"], str(override))

    assert mine.origin == str(override)
    assert render(mine, [USER]) == USER.content + "<|im_end|>"


def with_config(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]

    assert load_template(with_config(tmp_path, chat_template=named)).source == "d"
    with_config(tmp_path, chat_template=named[:1])
    with pytest.raises(ModelError, match=r"\(rag\) and none is called 'default'"):
        load_template(tmp_path)


def test_a_model_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    eos = {"content": "</s>", "lstrip": False}
    found = load_template(with_config(tmp_path, bos_token="<s>", eos_token=eos))

    assert found.origin == PLAIN_ORIGIN
    assert render(found, [SYSTEM, AGAIN, Message("assistant", "ja"), AGAIN], True) == (
        "<s>System:\n简短。\nUser:\n?\nAssistant:\nja</s>\nUser:\n?\nAssistant:\n"
    )
    with pytest.raises(ModelError, match="needs an end-of-sequence token"):
        load_template(with_config(tmp_path, bos_token="<s>"))


def test_a_template_that_cannot_be_used_is_named(tmp_path: Path, refuses: Any) -> None:
    (tmp_path / "bad.jinja").write_text("a\n{% for %}")
    (tmp_path / "gbk.jinja").write_bytes("你".encode("gbk"))
    with_config(tmp_path, eos_token="</s>")

    refuses(lambda: load_template(tmp_path, str(tmp_path / "bad.jinja")), "bad.jinja", "line 2")
    refuses(lambda: load_template(tmp_path, str(tmp_path / "gbk.jinja")), "gbk.jinja", "UTF-8")
    refuses(lambda: load_template(tmp_path, "no.jinja"), "--template no.jinja", "no such file")


def test_older_special_tokens_maps_are_read_as_transformers_does(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copy(model_dirs["minimind"] / "tokenizer.json", tmp_path)
    with_config(tmp_path, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    older = {"eos_token": {"content": "<|im_end|>", "single_word": False}, "pad_token": "<tts_pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))

    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)

    assert load_template(tmp_path).special_tokens == theirs.special_tokens_map
