"""Whether a data set is a classification in chat form, and with which answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mst.data.refusals import Place, RowError
from mst.data.rows import Row

MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 64
MIN_ROWS_A_LABEL = 5


@dataclass
class AnswerTally:
    """The different answers of the rows that were seen.

    Attributes:
        rows: how many were seen.
        answers: theirs; None once a row or their number shows that it is no classification.
    """

    rows: int = 0
    answers: set[str] | None = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Take a row into account."""
        self.rows += 1
        if self.answers is None:
            return
        answer = _short_answer(row)
        if answer is None:
            self.answers = None
            return
        self.answers.add(answer)
        if len(self.answers) > MAX_LABELS:
            self.answers = None

    def labels(self) -> tuple[str, ...] | None:
        """Return the sorted answers when the rows are a classification."""
        count = len(self.answers or ())
        if self.answers is None or count < 2 or self.rows < MIN_ROWS_A_LABEL * count:
            return None
        return tuple(sorted(self.answers))


def label_set(rows: Iterable[Row]) -> tuple[str, ...] | None:
    """Return the sorted answers of a classification data set, or None when it is not one.

    It is one when every row has a single assistant turn, as its last message, and the answers are
    2 to 64 short single lines that come back: at least five rows an answer on average.
    """
    tally = AnswerTally()
    for row in rows:
        tally.add(row)
    return tally.labels()


def unknown_answer(row: Row, answers: Sequence[str]) -> RowError | None:
    """Return the error for a held-out row with a label outside the set, which is always wrong.

    A row that is no question with a short answer is not judged.
    """
    answer = _short_answer(row)
    if answer is None or answer.strip() in {each.strip() for each in answers}:
        return None
    return RowError(
        Place(row.file, row.number, f"message {len(row.messages)}"),
        f"the assistant's answer is none of the {len(answers)} answers of --dataset",
        "Mend the answer, add rows with it to --dataset, or pass --label-accuracy off.",
    )


def _short_answer(row: Row) -> str | None:
    # Accuracy is measured on text: an answer to an image is none that could be generated there.
    if any(message.parts for message in row.messages):
        return None
    turns = [message.role == "assistant" for message in row.messages]
    if sum(turns) != 1 or not turns[-1]:
        return None
    answer = row.messages[-1].content
    short = len(answer) <= MAX_LABEL_CHARACTERS and len(answer.splitlines()) == 1
    return answer if short else None
