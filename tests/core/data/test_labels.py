from __future__ import annotations

import pytest

from mst.data.labels import label_set
from mst.data.rows import DataSet, Message, Row


def rows(*answers: str, times: int = 5) -> list[Row]:
    return [
        Row((Message("user", "q"), Message("assistant", answer)), "f", number)
        for number, answer in enumerate(answers * times, start=1)
    ]


def test_the_demo_is_a_classification_with_twelve_answers(demo: DataSet) -> None:
    labels = label_set(demo.rows)

    assert labels is not None
    assert len(labels) == 12
    assert list(labels) == sorted(labels)
    assert labels[0] == "activate my card"


def test_dialogues_are_no_classification(crosswoz: DataSet) -> None:
    assert label_set(crosswoz.rows) is None


def test_five_rows_an_answer_are_enough() -> None:
    assert label_set(rows("yes", "no")) == ("no", "yes")
    assert label_set(rows("yes", "no")[:-1]) is None


@pytest.mark.parametrize(
    "answers",
    [("yes",), ("a\nb", "c"), ("x" * 65, "y"), tuple(str(n) for n in range(65)), ("a\u2028b", "c")],
)
def test_what_is_no_short_line_out_of_a_few_is_none(answers: tuple[str, ...]) -> None:
    assert label_set(rows(*answers)) is None


def test_the_answer_is_the_only_assistant_turn_and_the_last_message() -> None:
    user, yes, no = Message("user", "q"), Message("assistant", "yes"), Message("assistant", "no")
    usual = rows("yes", "no")

    assert label_set([*usual, Row((user, yes, user, no), "f", 1)]) is None
    assert label_set([*usual, Row((user, yes, user), "f", 1)]) is None
    assert label_set([]) is None
