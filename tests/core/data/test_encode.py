from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst.data.encode import IGNORE, Encoded, Example, encode
from mst.data.offsets import labelled
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


def test_cutting_at_the_left_keeps_the_answer_and_its_end(smollm2: Model) -> None:
    rows = [row("long " * 90, "short answer"), row("q", "a", number=2)]
    whole, found = run(smollm2, rows).examples[0], run(smollm2, rows, max_length=60, cut="left")
    (cut, short) = found.examples

    assert cut.input_ids == whole.input_ids[-60:]
    assert cut.labels == whole.labels[-60:]
    assert short.row.number == 2
    assert (found.stats.too_long, found.stats.deleted, found.stats.truncated) == (1, 0, 1)


def test_a_weighted_turn_gives_its_tokens_their_factor(smollm2: Model) -> None:
    turns = (Message("user", "q"), Message("assistant", "half", weight=0.5))
    chat = Row((*turns, Message("user", "r"), Message("assistant", "full")), "rows.jsonl", 1)
    (example,) = run(smollm2, [chat]).examples
    (cut,) = run(smollm2, [chat], max_length=len(example.input_ids) - 1, cut="right").examples

    assert run(smollm2, [row("q", "a")]).examples[0].weights is None
    assert example.weights is not None
    factors: dict[float, list[int]] = {0.5: [], 1.0: [], 0.0: []}
    for token, label, weight in zip(
        example.input_ids, example.labels, example.weights, strict=True
    ):
        factors[weight].append(token)

        assert (label == IGNORE) == (weight == 0)
    assert smollm2[0].decode(factors[0.5]) == "half<|im_end|>"
    assert smollm2[0].decode(factors[1.0]) == "full<|im_end|>"
    assert cut.weights == example.weights[:-1]


def preference(better: str, worse: str, number: int = 1) -> Row:
    shared = row("q", "shared", "and?").messages
    return Row(
        (*shared, Message("assistant", better)),
        "rows.jsonl",
        number,
        rejected=(*shared, Message("assistant", worse)),
    )


def test_of_a_preference_only_what_differs_is_learned(smollm2: Model) -> None:
    (example,) = run(smollm2, [preference("good", "bad")]).examples
    worse = example.rejected

    assert worse is not None
    assert learned(smollm2[0], example) == "good<|im_end|>"
    assert learned(smollm2[0], worse) == "bad<|im_end|>"
    text = render(smollm2[1], example.row.rejected)
    assert smollm2[0].decode(worse.input_ids) == text


def test_a_preference_is_kept_only_when_both_conversations_fit(smollm2: Model) -> None:
    rows = [preference("good", "bad"), preference("a", "long " * 90, 2)]
    found = run(smollm2, [*rows, preference("long " * 90, "b", 3)], max_length=80)
    cut = run(smollm2, [*rows, preference("long " * 90, "b", 3)], max_length=80, cut="right")

    assert [each.row.number for each in found.examples] == [1]
    assert (found.stats.too_long, found.stats.deleted) == (2, 2)
    assert [each.row.number for each in cut.examples] == [1, 2, 3]
    worse = cut.examples[1].rejected
    assert worse is not None
    assert len(worse.input_ids) == 80
    gone = run(smollm2, [rows[0], preference("a", "b", 4)], max_length=20, cut="left")
    assert all(len(e.input_ids) == 20 for e in gone.examples)


def test_a_preference_without_an_answer_of_its_own_is_refused(
    smollm2: Model, refuses: Refuses
) -> None:
    same = preference(SECRET, SECRET, 8)
    shorter = Row(same.messages, "rows.jsonl", 9, rejected=same.messages[:-1])

    for each in (same, shorter):
        refuses(lambda r=each: run(smollm2, [r]), f"row {each.number}", "an answer of their own")


def test_with_a_kto_label_the_last_answer_alone_is_learned(smollm2: Model) -> None:
    messages = row("q", "one", "r", "two").messages
    rows = [Row(messages, "rows.jsonl", n, desirable=bool(n)) for n in (0, 1)]

    for example in run(smollm2, rows).examples:
        assert learned(smollm2[0], example) == "two<|im_end|>"


def document(text: str, number: int = 1) -> Row:
    return Row((), "corpus.txt", number, text=text)


def test_plain_text_is_learned_to_its_end(models: dict[str, Model]) -> None:
    tokenizer, template = models["qwen3"]
    rows = [document("Fine weather today."), row("q", "a"), document("今天天气很好。", 3)]
    first, chat, last = encode(rows, tokenizer, template, None).examples

    assert tokenizer.decode(first.input_ids) == "Fine weather today.<|im_end|>"
    assert tokenizer.decode(last.input_ids) == "今天天气很好。<|im_end|>"
    assert first.labels[1:] == first.input_ids[1:]
    assert first.labels[0] == IGNORE
    assert chat.row.messages


def test_plain_text_begins_as_the_tokenizer_begins_any_text(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    inner = Tokenizer.from_file(str(model_dirs["minimind"] / "tokenizer.json"))
    bos = "<|im_start|>"
    inner.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    config = (model_dirs["minimind"] / "tokenizer_config.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (example,) = encode(
        [document("Guten Tag")], load_tokenizer(tmp_path), load_template(tmp_path), None
    ).examples

    assert list(example.input_ids) == [*theirs("Guten Tag")["input_ids"], theirs.eos_token_id]
    assert example.input_ids[0] == theirs.convert_tokens_to_ids(bos)


def test_long_plain_text_is_divided_and_nothing_of_it_is_lost(smollm2: Model) -> None:
    long = document("The quick brown fox jumps over the lazy dog. " * 30)
    (whole,) = run(smollm2, [long]).examples
    found = run(smollm2, [long, document("short", 2)], max_length=64)
    pieces = [e for e in found.examples if e.row is long]
    ids = [token for piece in pieces for token in piece.input_ids]

    assert len(pieces) == -(-len(whole.input_ids) // 64)
    assert ids == list(whole.input_ids)
    assert all(piece.labels[0] == IGNORE for piece in pieces)
    assert all(piece.labels[1:] == piece.input_ids[1:] for piece in pieces)
    stats = found.stats
    assert (stats.rows, stats.too_long, stats.divided) == (len(pieces) + 1, 1, 1)
    assert (stats.deleted, stats.truncated) == (0, 0)


def test_when_no_row_is_left_the_lengths_are_named(smollm2: Model, refuses: Refuses) -> None:
    rows = [row(SECRET, SECRET), row(SECRET * 2, SECRET, number=2)]
    lengths = [len(example.input_ids) for example in run(smollm2, rows).examples]
    named = (f"shortest {lengths[0]} tokens", f"longest {lengths[1]}", f"--max-length {lengths[1]}")

    refuses(lambda: run(smollm2, rows, 8), "--max-length 8", "all 2 are longer", *named)
    refuses(lambda: run(smollm2, rows, 8, "right"), "--max-length 8", "beyond it", *named)
    refuses(lambda: run(smollm2, []), "none were given")
    refuses(lambda: run(smollm2, rows, 8, "up"), "--truncation-strategy 'up'", "right, left")


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
    assert [position for position, _ in labelled(offsets, spans)] == positions


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
