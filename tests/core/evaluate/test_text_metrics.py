"""Metrics of answers equal their libraries' own calls, and what a person would say."""

from __future__ import annotations

import pytest

from mst.evaluate.figures import figure
from mst.evaluate.text_metrics import TEXT_METRICS, WordTokenizer, bleu_tokenizer

SAID = ["The cat sat on the mat.", "It rains in Lima, often!", "", "a b c d e f"]
MEANT = ["The cat is on the mat.", "In Lima it seldom rains.", "Nothing", "a b c d e f"]
HAN_SAID = ["我想预订一家酒店", "故宫的门票是六十元。"]
HAN_MEANT = ["我要预订酒店", "故宫的门票是60元。"]


def values(metric: str, said: list[str], meant: list[str]) -> dict[str, float | None]:
    return {each.name: figure(each).value for each in TEXT_METRICS[metric](said, meant)}


@pytest.mark.parametrize(("said", "meant"), [(SAID, MEANT), (HAN_SAID, HAN_MEANT)])
def test_bleu_and_chrf_are_sacrebleus(said: list[str], meant: list[str]) -> None:
    import sacrebleu

    tokenize = "zh" if meant is HAN_MEANT else "13a"
    expected = sacrebleu.corpus_bleu(said, [meant], tokenize=tokenize).score

    assert bleu_tokenizer(meant) == tokenize
    assert expected > 1
    assert values("bleu", said, meant) == {"bleu": pytest.approx(expected)}
    assert values("chrf", said, meant) == {
        "chrf": pytest.approx(sacrebleu.corpus_chrf(said, [meant]).score)
    }


def test_rouge_on_english_is_rouge_scores_own() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scores = [RougeScorer(kinds).score(b, a) for a, b in zip(SAID, MEANT, strict=True)]
    expected = {kind: sum(each[kind].fmeasure for each in scores) / 4 for kind in kinds}

    assert values("rouge", SAID, MEANT) == pytest.approx(expected)


def test_rouge_takes_han_letter_by_letter_and_keeps_other_scripts() -> None:
    tokens = WordTokenizer().tokenize("GPT-4 预订 Café のお Привет_x")

    assert tokens == ["gpt", "4", "预", "订", "café", "の", "お", "привет", "x"]
    assert values("rouge", ["预订酒店"], ["预订房间"])["rouge1"] == pytest.approx(0.5)


def test_exact_match_is_strict_but_for_space_around_and_folded_beside_it() -> None:
    said = ["Lima ", "lima", "Ｌｉｍａ  city", "Quito"]
    meant = ["Lima", "Lima", "lima city", "Lima"]

    assert values("exact_match", said, meant) == {"exact_match": 0.25, "exact_match_folded": 0.75}


def test_json_is_judged_by_what_it_says() -> None:
    said = ['{"a": 1, "b": [2]}', '{"b":[2],"a":1.0}', "{'a': 1}", "NaN", "true"]
    meant = ['{"b": [2], "a": 1}', '{"b": [2], "a": 1}', '{"a": 1}', "plain text", "1"]

    assert values("json", said, meant) == {"json_valid": 0.6, "json_equal": 0.25}
    assert values("json", said, ["plain"] * 5) == {"json_valid": 0.6}


def test_deeply_nested_json_is_no_crash() -> None:
    assert values("json", ["[" * 100_000], ["1"]) == {"json_valid": 0.0, "json_equal": 0.0}
