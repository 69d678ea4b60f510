from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst.data.rows import DataSet, Message
from mst.data.spans import assistant_spans
from mst.data.template import ChatTemplate, load_template, render

SECRET = "Frau Müller 王小明 +49-151"
EMPTY_THINKING = "<think>\n\n</think>\n\n"


def template(source: str) -> ChatTemplate:
    stop = ("<|eot_id|>", "</s>")
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, stop, "here.jinja")


# Written after the habits of the families they are named for.
CHATML = template(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADER_ALWAYS_APPENDED = template(
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
USER_FIRST = template(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set lead = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set lead = '' %}{% endif %}"
    "{% if not messages %}{{ raise_exception('a user turn must come first') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ lead if loop.last }}{{ m.content }}"
    " [/INST]{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
REASONING_APART = template(
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "<|assistant|><think>{{ parts[0].split('<think>')[-1] if parts | length > 1 else '' }}</think>"
    "{{ parts[-1] }}</s>{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think></think>{% endif %}"
)
NEVER_STOPS = template(
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
SAYS_IT_TWICE = template(
    "{% for m in messages %}{{ m.content }}|{{ m.content }}</s>{% endfor %}{{ messages | length }}"
)


def user(content: str) -> Message:
    return Message("user", content)


def bot(content: str, loss: bool | None = None) -> Message:
    return Message("assistant", content, loss)


def learned(found: ChatTemplate, messages: list[Message], train_on: str = "assistant") -> list[str]:
    text, spans = assistant_spans(found, messages, train_on)

    assert text == render(found, messages)
    assert all(start < end for start, end, _ in spans)
    assert list(spans) == sorted(spans)
    return [text[start:end] for start, end, _ in spans]


CHAT = [Message("system", "s"), user("q"), bot("one"), user("q"), bot("two"), user("bye")]


def test_all_assistant_turns_carry_loss_with_their_end_and_nothing_else() -> None:
    assert learned(CHATML, CHAT) == ["one</s>", "two</s>"]
    assert learned(CHATML, CHAT, "last") == ["two</s>"]
    assert learned(CHATML, CHAT, "all") == [render(CHATML, CHAT)]


def test_a_messages_own_loss_overrides_the_choice() -> None:
    chat = [
        user("q"),
        bot("one", loss=True),
        user("q"),
        bot("two", loss=False),
        user("q"),
        bot("x"),
    ]

    assert learned(CHATML, chat) == ["one</s>", "x</s>"]
    assert learned(CHATML, chat, "last") == ["one</s>", "x</s>"]
    before, after = learned(CHATML, chat, "all")
    assert before.endswith("<|im_start|>assistant\n")
    assert after.startswith("\n<|im_start|>user")
    assert "two" not in before + after
    assert learned(CHATML, [user("q"), bot("one", loss=False)]) == []


def test_a_header_that_is_always_appended_carries_no_loss() -> None:
    assert learned(HEADER_ALWAYS_APPENDED, [user("q"), bot(" one\n")]) == ["one<|eot_id|>"]
    assert learned(HEADER_ALWAYS_APPENDED, CHAT) == ["one<|eot_id|>", "two<|eot_id|>"]


def test_a_template_that_wants_a_user_turn_first_and_moves_the_system_prompt_works() -> None:
    system = Message("system", "s")

    assert learned(USER_FIRST, [user("q"), bot("one")]) == [" one</s>"]
    assert learned(USER_FIRST, [system, user("q"), bot("a "), user("q"), bot("b")]) == [
        "a</s>",
        "b</s>",
    ]
    assert learned(USER_FIRST, [system, bot("hi")]) == ["hi</s>"]
    assert learned(USER_FIRST, [bot("hi")]) == ["hi</s>"]


def test_reasoning_that_is_sorted_into_a_block_carries_loss_within_its_turn() -> None:
    chat = [user("q"), bot("<think>hm</think>ja"), user("q"), bot("nein")]

    assert learned(REASONING_APART, chat) == ["hm</think>ja</s>", "nein</s>"]


def test_an_answer_that_the_prompt_quotes_is_found_in_its_own_place() -> None:
    chat = [user("say ja"), bot("ja"), user("ja</s>"), bot("ja")]
    _, spans = assistant_spans(CHATML, chat, "assistant")

    assert learned(CHATML, chat) == ["ja</s>", "ja</s>"]
    assert spans[0][0] == len(render(CHATML, chat[:1], add_generation_prompt=True))
    assert spans[1][0] == len(render(CHATML, chat[:3], add_generation_prompt=True))


def test_qwen3_learns_the_empty_thinking_that_its_prompt_leaves_out(
    model_dirs: dict[str, Path],
) -> None:
    qwen3 = load_template(model_dirs["qwen3"])
    thought = bot("<think>\nhm\n</think>\n\nja")

    assert learned(qwen3, [user("q"), bot("ja")]) == [EMPTY_THINKING + "ja<|im_end|>"]
    assert learned(qwen3, [user("q"), thought, user("q"), thought]) == [
        "ja<|im_end|>",
        "<think>\nhm\n</think>\n\nja<|im_end|>",
    ]


def test_minimind_learns_no_thinking_that_its_prompt_holds(model_dirs: dict[str, Path]) -> None:
    minimind = load_template(model_dirs["minimind"])

    assert learned(minimind, [user("q"), bot("ja")]) == ["ja<|im_end|>"]
    assert learned(minimind, [user("q"), bot("<think>\nhm\n</think>\n\nja")]) == [
        "hm\n</think>\n\nja<|im_end|>"
    ]


def test_base_models_learn_to_stop_by_the_plain_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')

    assert learned(load_template(tmp_path), CHAT) == ["one</s>", "two</s>"]


@pytest.mark.parametrize("family", ["minimind", "smollm2"])
def test_real_dialogues_are_learned_turn_by_turn(
    family: str, model_dirs: dict[str, Path], demo: DataSet, crosswoz: DataSet
) -> None:
    found = load_template(model_dirs[family])

    for row in (*demo.rows[:100], *crosswoz.rows):
        answers = [m.content + "<|im_end|>" for m in row.messages if m.role == "assistant"]

        assert learned(found, list(row.messages)) == answers


@pytest.mark.parametrize(
    ("found", "needles"),
    [
        (NEVER_STOPS, ("message 2", "here.jinja", "no end-of-turn token", "never stop", "</s>")),
        (SAYS_IT_TWICE, ("message 2", "here.jinja", "cannot be proved", "--train-on last")),
    ],
)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_what_would_not_stop_or_cannot_be_proved_is_refused(
    refuses: Callable[..., str], found: ChatTemplate, needles: tuple[str, ...], train_on: str
) -> None:
    chat = [user(SECRET), bot(SECRET)]

    refuses(lambda: assistant_spans(found, chat, train_on), *needles)


def test_an_unknown_choice_is_refused(refuses: Callable[..., str]) -> None:
    refuses(lambda: assistant_spans(CHATML, CHAT, "none"), "--train-on 'none'", "last, all")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TAGGED = st.sampled_from(
    ["</s>", "<|im_start|>assistant\n", "one", "\n", " ", "\ue000", "</think>"]
)
CONTENT = st.lists(TEXT | TAGGED, max_size=4).map("".join)
ANSWERS = CONTENT.filter(str.strip)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(CONTENT, ANSWERS), min_size=1, max_size=3), st.booleans())
def test_whatever_they_hold_answers_are_learned_whole_and_questions_never(
    pairs: list[tuple[str, str]], system: bool
) -> None:
    chat = [Message("system", "s")] if system else []
    for question, answer in pairs:
        chat += [user(question), bot(answer)]
    stripped = [answer.strip() + "<|eot_id|>" for _, answer in pairs]

    assert learned(CHATML, chat) == [answer + "</s>" for _, answer in pairs]
    assert learned(HEADER_ALWAYS_APPENDED, chat) == stripped


def test_a_weight_is_the_factor_of_its_turns_loss_and_zero_is_no_loss() -> None:
    def weighted(content: str, weight: float | None, loss: bool | None = None) -> Message:
        return Message("assistant", content, loss, weight)

    chat = [user("q"), weighted("a", 0.5), user("q"), weighted("b", 0), user("q"), bot("c")]
    text, spans = assistant_spans(CHATML, chat, "assistant")
    whole, parts = assistant_spans(CHATML, chat, "all")

    assert [(text[a:b], weight) for a, b, weight in spans] == [("a</s>", 0.5), ("c</s>", 1.0)]
    assert [whole[a:b] for a, b, weight in parts if weight == 0.5] == ["a</s>"]
    assert "".join(whole[a:b] for a, b, _ in parts) == whole.replace("b</s>", "")
    silent = [*chat[:4], user("q"), weighted("c", 2.0, loss=False)]
    assert [weight for *_, weight in assistant_spans(CHATML, silent, "assistant")[1]] == [0.5]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_factor_is_refused(refuses: Callable[..., str], weight: float) -> None:
    chat = [user(SECRET), Message("assistant", SECRET, weight=weight)]

    refuses(lambda: assistant_spans(CHATML, chat, "assistant"), "message 2", "from 0 on")


@pytest.mark.parametrize("turn", [Message("user", SECRET, True), Message("tool", SECRET, None, 1)])
def test_loss_on_any_other_turn_than_the_assistants_is_refused(
    refuses: Callable[..., str], turn: Message
) -> None:
    chat = [turn, bot(SECRET)]

    refuses(
        lambda: assistant_spans(CHATML, chat, "assistant"), "message 1", turn.role, "--train-on all"
    )


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": SECRET}}}
TOOL = {"type": "function", "function": {"name": "add", "description": SECRET, "parameters": {}}}
CALLING = [
    user(SECRET),
    Message("assistant", "so", tool_calls=(CALL,)),
    Message("tool", SECRET),
    bot("3"),
]
FIRST_CALL_ONLY = template(
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_RESULTS = template(
    "{% for m in messages if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls else '' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("found", "chat", "tools", "needles"),
    [
        (CHATML, CALLING, (), ("call 1 of message 2", "write it as the content")),
        (CHATML, [user(SECRET), bot("a")], (TOOL,), ("the row's tools", "in a system turn")),
        (
            CHATML,
            [user(SECRET), Message("assistant", "a", reasoning=SECRET)],
            (),
            ("the reasoning", "into the content"),
        ),
        (
            FIRST_CALL_ONLY,
            [user(SECRET), Message("assistant", "", tool_calls=(TOOL, CALL))],
            (),
            ("call 2 of message 2",),
        ),
        (NO_RESULTS, CALLING, (), ("the tool's result in message 3", "a user turn")),
    ],
)
def test_a_template_that_leaves_out_a_part_of_the_row_is_refused(
    refuses: Callable[..., str],
    found: ChatTemplate,
    chat: list[Message],
    tools: tuple[dict[str, object], ...],
    needles: tuple[str, ...],
) -> None:
    refuses(
        lambda: assistant_spans(found, chat, "assistant", tools), "here.jinja leaves out", *needles
    )


def test_qwen3_writes_tools_calls_and_results_and_may_leave_out_what_was_thought_before(
    model_dirs: dict[str, Path],
) -> None:
    qwen3 = load_template(model_dirs["qwen3"])
    text, spans = assistant_spans(qwen3, CALLING, "assistant", (TOOL,))
    before = [user("q"), Message("assistant", "a", reasoning="hm"), user("r"), bot("b")]
    calls, answer = (text[start:end] for start, end, _ in spans)

    assert calls.endswith('"arguments": {"a": "' + SECRET + '"}}\n</tool_call><|im_end|>')
    assert answer.endswith("3<|im_end|>")
    assert learned(qwen3, before) == ["a<|im_end|>", EMPTY_THINKING + "b<|im_end|>"]
