"""Which metrics are computed: those that were asked for, or those that suit the rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from mst.errors import EvaluationError, UsageError
from mst.evaluate.text_metrics import LIBRARIES, TEXT_METRICS

AUTO = "auto"
METRICS = ("loss", "labels", *TEXT_METRICS)
# With `auto`, answers are generated for at most so many rows: some minutes on a CPU for a small
# model. Beyond that they are made when they are asked for.
AUTO_ANSWERS = 200
_AUTO_TEXT = ("exact_match", "rouge", "bleu", "chrf")


def check_names(asked: Sequence[str]) -> None:
    """Make sure that the metrics that were asked for exist, and their libraries.

    Raises:
        UsageError: there is no such metric; names the nearest.
        EvaluationError: its library is not installed.
    """
    from mst.cli.options import nearest

    for name in asked:
        if name != AUTO and name not in METRICS:
            raise UsageError(
                f"--metric {name} is not one of {', '.join((AUTO, *METRICS))}."
                f"{nearest(name, METRICS)}"
            )
    lacking = [name for name in asked if not _installed(name)]
    if lacking:
        raise EvaluationError(
            f"--metric {lacking[0]} needs {LIBRARIES[lacking[0]]}, which is not installed here."
            " Install it: python -m pip install 'mst-train[eval]'"
        )


def _installed(name: str) -> bool:
    return name not in LIBRARIES or importlib.util.find_spec(LIBRARIES[name]) is not None


def chosen_metrics(
    asked: Sequence[str], references: int, answers: int | None, own: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the metrics to compute, and what to tell about the choice.

    Args:
        asked: by the user, checked; "auto" stands for a choice.
        references: rows that end with an answer.
        answers: in the set, when the data is a classification.
        own: the user has a metric of their own, for which answers are generated in any case.

    Raises:
        EvaluationError: one was asked for that these rows can't give.
    """
    needs_text = [each for each in asked if each in TEXT_METRICS]
    if (needs_text or own) and not references:
        raise EvaluationError(
            f"--metric {needs_text[0] if needs_text else 'FILE'} compares answers with references,"
            " but no row ends with an assistant's answer. Pass rows that do, or --metric loss."
        )
    if "labels" in asked and answers is None:
        raise EvaluationError(
            "--metric labels needs a classification: rows with one assistant's turn at the end, and"
            " 2 to 64 short answers that come back. These rows are none. Pass --metric exact_match."
        )
    found = ["loss", *(each for each in METRICS if each in asked and each != "loss")]
    if AUTO not in asked:
        return tuple(found if "loss" in asked else found[1:]), ()
    notes = []
    if answers is not None:
        found.append("labels")
    elif references and (own or needs_text or references <= AUTO_ANSWERS):
        found += [each for each in _AUTO_TEXT if _installed(each)]
        if not all(map(_installed, _AUTO_TEXT)):
            notes.append("ROUGE and BLEU: python -m pip install 'mst-train[eval]'")
    elif references:
        notes.append(
            f"{references} rows: answers are generated only when asked for, with --metric"
            " exact_match rouge bleu chrf, or with --limit"
        )
    return tuple(dict.fromkeys(found)), tuple(notes)
