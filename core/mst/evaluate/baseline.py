"""What a classical model makes of the same rows: the figure a tuned model must be held against."""

from __future__ import annotations

from collections.abc import Sequence

from mst.data.rows import Row


def _text(row: Row) -> str:
    # The system turn is the same in every row, so it tells nothing.
    return "\n".join(each.content for each in row.messages[:-1] if each.role != "system")


def baseline_accuracy(train: Sequence[Row], test: Sequence[Row]) -> float | None:
    """Return the accuracy of TF-IDF + logistic regression, or None without scikit-learn.

    Words and pairs of words, C = 10: the plain setting that is hard to beat on short texts.
    Character n-grams join in for scripts that don't put spaces between words.

    Args:
        train: the very rows that the model was tuned on.
        test: the very rows that it was asked.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        return None
    texts = [_text(each) for each in train]
    spaced = sum(text.count(" ") for text in texts) > sum(map(len, texts)) / 20
    words = (
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        if spaced
        else TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    )
    model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(texts, [each.messages[-1].content.strip() for each in train])
    score = model.score(
        [_text(each) for each in test], [each.messages[-1].content.strip() for each in test]
    )
    return float(score)
