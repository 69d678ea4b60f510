"""What judges sampled answers: rules that come with mst, and functions of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mst.cli.options import nearest
from mst.errors import TrainingError, UsageError
from mst.request import TrainRequest
from mst.user_function import UserFunction, load_function, numbers_of, result_of, split_spec

OPTION = "--reward-funcs"
DEFAULT_NAME = "reward"
# The figures of `mst eval` that judge an answer on its own, by the metric that gives them.
RULES = {
    "exact_match": "exact_match",
    "exact_match_folded": "exact_match",
    "json_valid": "json",
}
Turns = list[dict[str, str]]
Judge = Callable[[Sequence[Turns], Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Reward:
    """One judge of answers.

    Attributes:
        name: of the rule or the function.
        weight: factor in the sum.
        judge: a finite number for each answer, of prompts, answers and references.
    """

    name: str
    weight: float
    judge: Judge


def find_rewards(request: TrainRequest) -> tuple[Reward, ...]:
    """Return the judges that a request names; files are run.

    Raises:
        UsageError: there is none, no such rule, a file fails, or the weights are not as many
            finite numbers.
    """
    specs = request.reward_funcs
    if not specs:
        raise UsageError(
            f"--task {request.task} was asked for without {OPTION}, so nothing says which answers"
            f" are good. Pass {', '.join(RULES)}, or FILE.py:FUNCTION."
        )
    weights = _weights(request)
    found = [_found(spec) for spec in specs]
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{OPTION} names {twice} twice, so that metrics could not tell them apart. Name each"
            " once, and give it a weight with --reward-weights."
        )
    return tuple(
        Reward(name, weight, judge) for (name, judge), weight in zip(found, weights, strict=True)
    )


def absolute_specs(specs: Sequence[str]) -> tuple[str, ...]:
    """Return the names of judges with the paths of files made absolute, for a run that resumes."""
    return tuple(
        spec if spec in RULES else str(Path(spec).expanduser().absolute()) for spec in specs
    )


def _weights(request: TrainRequest) -> list[float]:
    count = len(request.reward_funcs)
    if not request.reward_weights:
        return [1.0] * count
    try:
        found = [float(each) for each in request.reward_weights]
    except ValueError:
        found = []
    if len(found) != count or not all(abs(each) < float("inf") for each in found):
        raise UsageError(
            f"--reward-weights {' '.join(request.reward_weights)} was given; there must be"
            f" {count} finite numbers, one for each of {OPTION}."
        )
    return found


def _found(spec: str) -> tuple[str, Judge]:
    if spec in RULES:
        return spec, partial(_by_rule, spec)
    if not split_spec(spec, DEFAULT_NAME)[0].endswith(".py"):
        raise UsageError(
            f"{OPTION} {spec} was asked for; the rules are {', '.join(RULES)}."
            f"{nearest(spec, list(RULES))} Pass one of these, or FILE.py:FUNCTION."
        )
    function = load_function(spec, OPTION, DEFAULT_NAME, UsageError)
    # What fails later stops a run that has begun.
    function = replace(function, error=TrainingError)
    return function.name, partial(_by_function, function)


def _by_rule(
    name: str, prompts: Sequence[Turns], completions: Sequence[str], references: Sequence[str]
) -> list[float]:
    from mst.evaluate.text_metrics import TEXT_METRICS

    found = TEXT_METRICS[RULES[name]](completions, references)
    rows = next(each.rows for each in found if each.name == name)
    assert rows is not None
    return [row[0] for row in rows]


def _by_function(
    function: UserFunction,
    prompts: Sequence[Turns],
    completions: Sequence[str],
    references: Sequence[str],
) -> list[float]:
    result: Any = result_of(function, list(prompts), list(completions), list(references))
    count = len(completions)
    return numbers_of(function, result, count, f"a list of {count} finite numbers, one an answer")
