from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst.data.encode import IGNORE, Encoded, Example, encode, labelled
from mst.data.rows import DataSet, Message, Row
from mst.data.template import ChatTemplate, load_template, render
from mst.data.tokens import TextTokenizer, load_tokenizer

Refuses = Callable[..., str]
Model = tuple[TextTokenizer, ChatTemplate]

SECRET = "Frau Müller 王小明 +49-151"


@pytest.fixture(scope="module")
def models(model_dirs: dict[str, Path]) -> dict[str, Model]:
    return {name: (load_tokenizer(at), load_template(at)) for name, at in model_dirs.items()}


@pytest.fixture(scope="module")
def smollm2(models: dict[str, Model]) -> Model:
    return models["smollm2"]


def row(*contents: str, number: int = 1) -> Row:
    roles = ("user", "assistant") * len(contents)
    turns = tuple(Message(role, text) for role, text in zip(roles, contents, strict=False))
    return Row(turns, "rows.jsonl", number)


def learned(tokenizer: TextTokenizer, example: Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


def run(
    model: Model, rows: list[Row], max_length: int | None = None, cut: str = "delete"
) -> Encoded:
    return encode(rows, *model, max_length, "assistant", cut)


@pytest.mark.parametrize("family", ["minimind", "smollm2"])
def test_the_learned_tokens_are_the_answers_with_their_ends_exactly(
    family: str, models: dict[str, Model], demo: DataSet, crosswoz: DataSet
) -> None:
    tokenizer, template = models[family]
    rows = [*demo.rows, *crosswoz.rows]
    examples = run(models[family], rows).examples

    assert [example.row for example in examples] == rows
    for example in examples:
        messages = example.row.messages
        answers = [m.content + "<|im_end|>" for m in messages if m.role == "assistant"]

        assert tokenizer.decode(example.input_ids) == render(template, messages)
        assert learned(tokenizer, example) == "".join(answers)


def test_qwen3_learns_the_thinking_block_and_chinese_answers(
    models: dict[str, Model], crosswoz: DataSet
) -> None:
    tokenizer, template = models["qwen3"]
    for each in crosswoz.rows:
        example = encode([each], tokenizer, template, None, "last").examples[0]
        answer = [m.content for m in each.messages if m.role == "assistant"][-1]

        assert learned(tokenizer, example) == f"<think>\n\n</think>\n\n{answer}<|im_end|>"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(deadline=None, max_examples=150)
@given(question=TEXT, answer=TEXT.filter(str.strip))
def test_any_answer_is_learned_whole_and_no_question_is(
    smollm2: Model, question: str, answer: str
) -> None:
    tokenizer, template = smollm2
    (example,) = run(smollm2, [row(question, answer)]).examples
    first = next(at for at, label in enumerate(example.labels) if label != IGNORE)
    before = tokenizer.decode(example.input_ids[:first])
    prompt = render(template, [Message("user", question)], add_generation_prompt=True)

    # A token may hold the prompt's last line break and the answer's first: it is learned.
    glued = answer[0].isspace()
    assert prompt.startswith(before) if glued else before == prompt
    assert learned(tokenizer, example).endswith(answer + "<|im_end|>")


def test_the_first_token_carries_no_loss_even_when_all_do(smollm2: Model) -> None:
    (example,) = encode([row("q", "a")], *smollm2, None, "all").examples

    assert example.labels[0] == IGNORE
    assert example.labels[1:] == example.input_ids[1:]


def test_long_rows_are_left_out_and_counted(smollm2: Model) -> None:
    rows = [row("q", "a"), row("q", "long " * 90, number=2), row("q", "b", number=3)]
    whole, found = run(smollm2, rows), run(smollm2, rows, max_length=60)

    assert [example.row.number for example in found.examples] == [1, 3]
    assert (found.stats.rows, found.stats.too_long, found.stats.deleted) == (2, 1, 1)
    assert found.stats.truncated == 0
    assert found.stats.longest == whole.stats.longest == len(whole.examples[1].input_ids)
    assert found.stats.tokens == sum(len(example.input_ids) for example in found.examples)
    assert found.stats.label_tokens == 4


def test_long_rows_are_cut_unless_nothing_to_learn_is_left(smollm2: Model) -> None:
    rows = [row("q", "a"), row("q", "long " * 90, number=2), row("q " * 90, "b", number=3)]
    found = run(smollm2, rows, max_length=60, cut="right")

    assert [example.row.number for example in found.examples] == [1, 2]
    assert len(found.examples[1].input_ids) == len(found.examples[1].labels) == 60
    assert (found.stats.too_long, found.stats.deleted, found.stats.truncated) == (2, 1, 1)


def test_when_no_row_is_left_the_lengths_are_named(smollm2: Model, refuses: Refuses) -> None:
    rows = [row(SECRET, SECRET), row(SECRET * 2, SECRET, number=2)]
    lengths = [len(example.input_ids) for example in run(smollm2, rows).examples]
    named = (f"shortest {lengths[0]} tokens", f"longest {lengths[1]}", f"--max-length {lengths[1]}")

    refuses(lambda: run(smollm2, rows, 8), "--max-length 8", "all 2 are longer", *named)
    refuses(lambda: run(smollm2, rows, 8, "right"), "--max-length 8", "beyond it", *named)
    refuses(lambda: run(smollm2, []), "none were given")
    refuses(lambda: run(smollm2, rows, 8, "left"), "--truncation-strategy 'left'", "delete, right")


def test_a_row_that_the_template_refuses_is_named_and_not_quoted(
    smollm2: Model, refuses: Refuses
) -> None:
    tokenizer, template = smollm2
    strict = ChatTemplate(
        "{% if messages[0].content != 'q' %}{{ raise_exception('No: ' + messages[0].content) }}"
        "{% endif %}" + template.source,
        template.special_tokens,
        template.stop_tokens,
        "strict.jinja",
    )
    rows = [row("q", "a"), row(SECRET, "a", number=7)]
    silent = Row((Message("user", SECRET), Message("assistant", SECRET, False)), "rows.jsonl", 9)

    refuses(lambda: encode(rows, tokenizer, strict, None), "rows.jsonl, row 7", "strict.jinja")
    refuses(lambda: run(smollm2, [silent]), "rows.jsonl, row 9", "'loss' is false")


def test_an_example_prints_no_text(smollm2: Model) -> None:
    found = run(smollm2, [row(SECRET, SECRET)])

    assert repr(found.examples) == "(Example(),)"


@pytest.mark.parametrize(
    ("offsets", "spans", "positions"),
    [
        # One character in three byte tokens, and its neighbours.
        ([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(1, 2)], [1, 2, 3]),
        # A leading space belongs to its token: half of it overlaps.
        ([(0, 2), (2, 5)], [(3, 5)], [1]),
        # White space that was trimmed to no width, inside and before a span.
        ([(0, 3), (5, 5), (5, 8)], [(4, 8)], [1, 2]),
        ([(0, 3), (5, 5), (5, 8)], [(5, 8)], [2]),
        # Tokens that stand for no character, at a span's start and right after its end.
        ([(0, 3), (3, 3), (3, 8), (8, 8), (8, 9)], [(3, 8)], [1, 2]),
        ([(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 1), (2, 3)], [0, 2]),
        ([(0, 4)], [(0, 1), (3, 4)], [0]),
        ([(0, 1)], [], []),
    ],
)
def test_a_token_is_learned_when_its_characters_overlap_a_span(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], positions: list[int]
) -> None:
    assert labelled(offsets, spans) == positions


def test_ten_thousand_rows_take_seconds(smollm2: Model, demo: DataSet) -> None:
    rows = [*demo.rows * 7][:10_000]
    start = time.perf_counter()
    run(smollm2, rows, max_length=512)

    # Under one second on two quiet cores.
    assert time.perf_counter() - start < 10


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "datasets", "pandas", "numpy", "jinja2", "tokenizers"}
    code = (
        "import sys, mst.data.encode, mst.data.formats, mst.data.labels, mst.data.split;"
        f"print({heavy!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"
