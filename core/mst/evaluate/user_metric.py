"""A metric of the user's own, from a Python file that the user names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mst.errors import EvaluationError
from mst.evaluate.figures import Statistic, mean_of
from mst.user_function import UserFunction, is_number, load_function, numbers_of, result_of

DEFAULT_NAME = "metric"


def load_metric(spec: str) -> UserFunction:
    """Run a Python file and return the function that it defines.

    Args:
        spec: FILE.py or FILE.py:FUNCTION.

    Raises:
        EvaluationError: the file is not there, fails, or defines no such function. It names the
            line, and quotes nothing.
    """
    return load_function(spec, "--metric-file", DEFAULT_NAME, EvaluationError)


def user_statistic(
    metric: UserFunction, predictions: Sequence[str], references: Sequence[str]
) -> Statistic:
    """Return what the user's function makes of the answers.

    Args:
        metric: from `load_metric`.
        predictions: the answers.
        references: what they should be.

    Raises:
        EvaluationError: it raises, or returns something else than a number or one number a row.
    """
    result = result_of(metric, list(predictions), list(references))
    if is_number(result):
        return Statistic(metric.name, None, lambda sums: math.nan, whole=float(result))
    count = len(predictions)
    wanted = f"one finite number, or a list of {count} of them, one a row"
    return mean_of(metric.name, numbers_of(metric, result, count, wanted))
