"""Metrics of generated answers against references: exact match, ROUGE, BLEU, chrF, JSON."""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from mst.evaluate.figures import Statistic, mean_of, ratio_of

# Han and kana are written without spaces between words: ROUGE takes each as a word, as the
# Chinese summarization sets are scored.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_KANA = "\u3040-\u30ff"
_WORD = re.compile(f"[{_HAN}{_KANA}]|[^\\W_{_HAN}{_KANA}]+")
_HAN_LETTER = re.compile(f"[{_HAN}]")
_ROUGE = ("rouge1", "rouge2", "rougeL")
# Above this share of Han among the references' characters, BLEU splits words as sacrebleu's "zh".
_HAN_SHARE = 0.2


class WordTokenizer:
    """Splits text for rouge-score: lower-case words, and single Han and kana letters.

    On ASCII it is rouge-score's own (without stemming), which drops every other letter.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text."""
        return _WORD.findall(text.lower())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[Statistic]:
    """Return the shares of answers that equal their reference, strictly and folded.

    Strictly: but for white space at both ends. Folded: also but for case, width of characters
    (NFKC) and the amount of white space.
    """
    pairs = list(zip(predictions, references, strict=True))
    return [
        mean_of("exact_match", [a.strip() == b.strip() for a, b in pairs]),
        mean_of("exact_match_folded", [_folded(a) == _folded(b) for a, b in pairs]),
    ]


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def rouge(predictions: Sequence[str], references: Sequence[str]) -> list[Statistic]:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), tokenizer=WordTokenizer())
    pairs = zip(references, predictions, strict=True)
    scores = [scorer.score(reference, prediction) for reference, prediction in pairs]
    return [mean_of(kind, [each[kind].fmeasure for each in scores]) for kind in _ROUGE]


def bleu(predictions: Sequence[str], references: Sequence[str]) -> list[Statistic]:
    """Return corpus BLEU, from 0 to 100, as sacrebleu computes it."""
    from sacrebleu.metrics.bleu import BLEU

    return [_of_corpus("bleu", BLEU(tokenize=bleu_tokenizer(references)), predictions, references)]


def chrf(predictions: Sequence[str], references: Sequence[str]) -> list[Statistic]:
    """Return corpus chrF, from 0 to 100, as sacrebleu computes it."""
    from sacrebleu.metrics.chrf import CHRF

    return [_of_corpus("chrf", CHRF(), predictions, references)]


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Return sacrebleu's name of the tokenizer that suits the references."""
    text = "".join(references)
    return "zh" if len(_HAN_LETTER.findall(text)) > _HAN_SHARE * len(text) else "13a"


def _of_corpus(
    name: str, metric: Any, predictions: Sequence[str], references: Sequence[str]
) -> Statistic:
    # The two methods that every metric of sacrebleu defines; its own bootstrap sums the same
    # statistics, but draws the rows itself, so that other metrics could not share the draws.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = metric._extract_corpus_statistics(list(predictions), [list(references)])

    def value(sums: Sequence[float]) -> float:
        return float(metric._compute_score_from_stats([round(each) for each in sums]).score)

    return Statistic(name, tuple(tuple(map(float, each)) for each in rows), value)


def json_answers(predictions: Sequence[str], references: Sequence[str]) -> list[Statistic]:
    """Return the share of answers that are JSON and, where references are, that equal theirs."""
    said = [_parsed(each) for each in predictions]
    meant = [_parsed(each) for each in references]
    equal = [
        (float(a is not None and a == b), 1.0) if b is not None else (0.0, 0.0)
        for a, b in zip(said, meant, strict=True)
    ]
    valid = mean_of("json_valid", [each is not None for each in said])
    return [valid, ratio_of("json_equal", equal)] if any(meant) else [valid]


def _parsed(text: str) -> str | None:
    """Return a text's JSON in one way of writing it, None when it is none."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        # 1 and true, or 1 and 1.0, compare equal in Python and are not the same JSON.
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> float:
    # Python's parser takes NaN and Infinity, which RFC 8259 does not.
    raise ValueError


TextMetric = Callable[[Sequence[str], Sequence[str]], list[Statistic]]
TEXT_METRICS: dict[str, TextMetric] = {
    "exact_match": exact_match,
    "rouge": rouge,
    "bleu": bleu,
    "chrf": chrf,
    "json": json_answers,
}
# What a metric needs: its library's module.
LIBRARIES = {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}
