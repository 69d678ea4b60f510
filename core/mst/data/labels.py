"""Whether a data set is a classification in chat form, and with which answers."""

from __future__ import annotations

from collections.abc import Sequence

from mst.data.rows import Row

MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 64
MIN_ROWS_A_LABEL = 5


def label_set(rows: Sequence[Row]) -> tuple[str, ...] | None:
    """Return the sorted answers of a classification data set, or None when it is not one.

    It is one when every row has a single assistant turn, as its last message, and the answers are
    2 to 64 short single lines that come back: at least five rows an answer on average.
    """
    answers: set[str] = set()
    for row in rows:
        turns = [message.role == "assistant" for message in row.messages]
        if sum(turns) != 1 or not turns[-1]:
            return None
        answer = row.messages[-1].content
        if len(answer) > MAX_LABEL_CHARACTERS or len(answer.splitlines()) != 1:
            return None
        answers.add(answer)
        if len(answers) > MAX_LABELS:
            return None
    if len(answers) < 2 or len(rows) < MIN_ROWS_A_LABEL * len(answers):
        return None
    return tuple(sorted(answers))
