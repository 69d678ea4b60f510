"""Spans against the chat templates that TRL ships, each with and without `{% generation %}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mst.data.encode import IGNORE, encode
from mst.data.marks import answer_of
from mst.data.rows import DataSet, Message, Row
from mst.data.spans import assistant_spans
from mst.data.template import ChatTemplate
from mst.data.tokens import load_tokenizer
from mst.errors import DataError

trl = pytest.importorskip("trl", reason="its chat templates are the oracle")

FOLDER = Path(trl.__file__).parent / "chat_templates"
TRAINING = sorted(path.stem for path in FOLDER.glob("*_training.jinja"))
# Ends of turns of all these families. GLM ends an answer with the header of who speaks next.
STOP_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>", "<|eot|>", "<|eom|>", "<|call|>", "<|return|>", "</s>",
    "<end_of_utterance>", "<|user|>", "<|observation|>",
)  # fmt: skip
# These write the parts of a list of content, and nothing of a text.
IMAGES_ONLY = {"idefics3_training", "smolvlm_training", "llava_next_training"}

CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "add", "arguments": {"a": 1, "b": "zwei"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "one"},
                "b": {"type": "string", "description": "two"},
            },
            "required": ["a"],
        },
    },
}


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


ANSWERED = Message("tool", "3", tool_call_id="call00001", name="add")
THOUGHT = bot("<think>\nhm\n</think>\n\nja")
CASES = {
    "calls": (user("1+2?"), bot("", tool_calls=(CALL,)), ANSWERED, bot("It is 3.")),
    "parallel": (
        user("1+2?"), bot("", tool_calls=(CALL, CALL)), ANSWERED, ANSWERED, bot("It is 3."),
    ),
    "thinks and calls": (
        Message("system", "s"), user("1+2?"), bot("so", reasoning="hm", tool_calls=(CALL,)),
        ANSWERED, bot("It is 3."), user("and?"), bot("no"),
    ),
    "thinks in its text": (user("q"), THOUGHT, user("q"), THOUGHT),
    "thinks apart": (user("q"), bot("ja", reasoning="hm"), user("r"), bot("no", reasoning="hum")),
    "twice in a row": (user("q"), bot("a"), bot("b"), user("r"), bot(" c ")),
    "speaks first": (bot("hi"), user("q"), bot("x")),
}  # fmt: skip
# What ours refuses though transformers renders it: DiffusionGemma writes a call, its result and
# the answer as one turn, and two answers too, with one end; Muse Glimmer writes no text beside a
# call; Qwen, LFM2 and Phi join nothing. GPT-OSS and DeepSeek keep one call of several.
REFUSED: dict[str, set[str]] = {
    "diffusion_gemma_training": {"calls", "parallel", "thinks and calls", "twice in a row"},
    "muse_glimmer_training": {"thinks and calls"},
}


def plain(message: Message) -> dict[str, Any]:
    fields = {
        "reasoning_content": message.reasoning,
        "thinking": message.reasoning,
        "tool_calls": list(message.tool_calls) or None,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    given = {key: value for key, value in fields.items() if value is not None}
    return {"role": message.role, "content": message.content, **given}


def template(name: str, special_tokens: dict[str, str]) -> ChatTemplate:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, special_tokens, STOP_TOKENS, name)


@pytest.fixture(scope="module")
def cases(crosswoz: DataSet) -> dict[str, tuple[tuple[Message, ...], tuple[Any, ...]]]:
    real = {f"real {row.number}": row.messages for row in crosswoz.rows[:4]}
    real["real, question last"] = (*crosswoz.rows[4].messages, user("谢谢"))
    found: dict[str, tuple[tuple[Message, ...], tuple[Any, ...]]] = {
        name: (messages, ()) for name, messages in real.items()
    }
    for name, messages in CASES.items():
        calls = any(message.tool_calls for message in messages)
        found[name] = (messages, (TOOL,) if calls else ())
    return found


@pytest.fixture(scope="module")
def theirs(model_dirs: dict[str, Path]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(model_dirs[name]) for name in ("minimind", "qwen3")}


@pytest.mark.parametrize("name", TRAINING)
def test_marked_turns_are_token_for_token_those_of_transformers(
    name: str,
    theirs: dict[str, Any],
    model_dirs: dict[str, Path],
    cases: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Many leave out tools or reasoning and are refused such rows, which the next test is about;
    # here the tokens of what they do write are compared all the same.
    monkeypatch.setattr("mst.data.spans.refuse_omissions", lambda *given: None)
    family = "qwen3" if "qwen" in name else "minimind"
    oracle, tokenizer = theirs[family], load_tokenizer(model_dirs[family])
    ours = template(name, dict(oracle.special_tokens_map))
    refused, compared = set(), 0
    for case, (messages, tools) in cases.items():
        row = Row(messages, "rows.jsonl", 1, tools=tools)
        try:
            expected = oracle.apply_chat_template(
                [plain(message) for message in messages],
                tools=list(tools) or None,
                chat_template=ours.source,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception:
            with pytest.raises(DataError):
                encode([row], tokenizer, ours, None)
            continue
        try:
            (example,) = encode([row], tokenizer, ours, None).examples
        except DataError:
            refused.add(case)
            continue
        compared += 1
        mask = [int(label != IGNORE) for label in example.labels]

        assert list(example.input_ids) == expected["input_ids"], case
        assert mask[1:] == expected["assistant_masks"][1:], case
    if name in IMAGES_ONLY:
        assert compared == 0
    else:
        assert refused == REFUSED.get(name, set())
        assert compared >= 5


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in IMAGES_ONLY])
def test_rows_are_refused_exactly_when_their_tools_calls_or_reasoning_are_not_in_the_text(
    name: str, theirs: dict[str, Any], cases: dict[str, Any]
) -> None:
    oracle = theirs["minimind"]
    ours = template(name, dict(oracle.special_tokens_map))

    def text_of(case: str) -> str:
        messages, tools = cases[case]
        return str(
            oracle.apply_chat_template(
                [plain(message) for message in messages],
                tools=list(tools) or None,
                chat_template=ours.source,
                tokenize=False,
            )
        )

    for case in ("calls", "parallel", "thinks and calls", "thinks apart"):
        messages, tools = cases[case]
        try:
            text, apart = text_of(case), text_of("thinks apart")
        except Exception:
            continue  # the template says itself that it cannot
        calls = sum(len(message.tool_calls) for message in messages)
        missing = (
            text.count("zwei") < calls
            or (bool(tools) and "Adds." not in text)
            or ("thinks" in case and "hum" not in apart)
        )
        try:
            assistant_spans(ours, messages, "assistant", tools)
            said = ""
        except DataError as error:
            said = str(error)

        assert ("leaves out" in said) == missing, (case, said)


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in IMAGES_ONLY])
def test_prefix_rendering_learns_no_more_than_the_marks_say_and_every_answer(
    name: str, theirs: dict[str, Any], cases: dict[str, Any]
) -> None:
    special = dict(theirs["minimind"].special_tokens_map)
    marked, unmarked = template(name, special), template(name.removesuffix("_training"), special)
    compared = 0
    for messages, tools in cases.values():
        try:
            text, marks = assistant_spans(marked, messages, "assistant", tools)
            same, spans = assistant_spans(unmarked, messages, "assistant", tools)
        except DataError:
            continue
        if text != same:
            continue  # this training template writes other text than the model's own
        compared += 1
        learned = {at for start, end, _ in spans for at in range(start, end)}

        assert learned <= {at for start, end, _ in marks for at in range(start, end)}
        for start, end, _ in marks:
            missing = "".join(text[at] for at in range(start, end) if at not in learned)
            # Short ones ("a") stand in the headers too, which the prompt holds already.
            answers = [answer_of(each) for each in messages if each.role == "assistant"]
            assert not any(len(answer) > 3 and answer in missing for answer in answers)
    assert compared or name in {"glm4moe_training", "qwen3_training"}
