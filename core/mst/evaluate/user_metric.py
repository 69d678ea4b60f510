"""A metric of the user's own, from a Python file that the user names."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.errors import EvaluationError
from mst.evaluate.figures import Statistic, mean_of

DEFAULT_NAME = "metric"


@dataclass(frozen=True)
class UserMetric:
    """A loaded function, and the file that it came from."""

    name: str
    file: str
    function: Callable[[list[str], list[str]], Any]


def split_spec(spec: str) -> tuple[str, str]:
    """Return the absolute file and the function's name of FILE[:FUNCTION]."""
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        file, name = spec, DEFAULT_NAME
    return str(Path(file).expanduser().absolute()), name


def load_metric(spec: str) -> UserMetric:
    """Run a Python file and return the function that it defines.

    Args:
        spec: FILE.py or FILE.py:FUNCTION.

    Raises:
        EvaluationError: the file is not there, fails, or defines no such function. It names the
            line, and quotes nothing.
    """
    file, name = split_spec(spec)
    try:
        source = Path(file).read_bytes()
    except OSError as error:
        raise EvaluationError(
            f"--metric-file {file} cannot be read: {error.strerror}. Pass a Python file, and"
            " after a colon the function's name."
        ) from None
    names: dict[str, Any] = {"__name__": "mst_metric_file", "__file__": file}
    problem = ""
    try:
        exec(compile(source, file, "exec"), names)
    except SyntaxError as error:
        problem = f"SyntaxError in line {error.lineno}"
    except Exception as error:
        problem = _where(error, file)
    if problem:
        raise EvaluationError(f"--metric-file {file} failed as it was loaded: {problem}. Mend it.")
    function = names.get(name)
    if not callable(function):
        here = [key for key, each in names.items() if callable(each) and key[0] != "_"]
        raise EvaluationError(
            f"--metric-file {file} defines no function {name} (found:"
            f" {', '.join(here) or 'none'}). Name it: --metric-file {Path(file).name}:FUNCTION"
        )
    return UserMetric(name, file, function)


def _where(error: BaseException, file: str) -> str:
    """Return an exception's type and the innermost line of the user's file: never its text."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__)
             if each.filename == file]  # fmt: skip
    return type(error).__name__ + (f" in line {lines[-1]}" if lines else "")


def user_statistic(
    metric: UserMetric, predictions: Sequence[str], references: Sequence[str]
) -> Statistic:
    """Return what the user's function makes of the answers.

    Args:
        metric: from `load_metric`.
        predictions: the answers.
        references: what they should be.

    Raises:
        EvaluationError: it raises, or returns something else than a number or one number a row.
    """
    problem = ""
    result: Any = None
    try:
        result = metric.function(list(predictions), list(references))
    except Exception as error:
        problem = _where(error, metric.file)
    # Raised outside the handler, because the exception may hold answers.
    if problem:
        raise EvaluationError(
            f"{metric.name} of --metric-file {metric.file} raised {problem} (its text is withheld,"
            " it might quote a row). Mend it there."
        )
    if _is_number(result):
        return Statistic(metric.name, None, lambda sums: math.nan, whole=float(result))
    values = list(result) if isinstance(result, (list, tuple)) or hasattr(result, "tolist") else []
    if len(values) != len(predictions) or not all(map(_is_number, values)):
        raise EvaluationError(
            f"{metric.name} of --metric-file {metric.file} returned {_described(result, values)};"
            f" it must return one finite number, or a list of {len(predictions)} of them, one a"
            " row. Mend it there."
        )
    return mean_of(metric.name, [float(each) for each in values])


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _described(result: object, values: Sequence[object]) -> str:
    if not values:
        return f"{type(result).__name__}, which is no finite number" if isinstance(
            result, numbers.Real) else type(result).__name__  # fmt: skip
    odd = next((type(each).__name__ for each in values if not _is_number(each)), "number")
    return f"a {type(result).__name__} of {len(values)} with {odd} in it"
