"""What was chosen so far. It is kept, so that a broken connection or going back loses nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mst.durable import write_text

ANSWERING, CLASSIFICATION, STYLE, PREFERENCE = "answering", "classification", "style", "preference"
GOALS = (ANSWERING, CLASSIFICATION, STYLE, PREFERENCE)
QUICK_STEPS = 10
# Shapes of data whose answers are judged, and the task that learns from each.
_JUDGED = {"preference": "dpo", "kto": "kto"}


@dataclass(frozen=True)
class Draft:
    """The choices on the way to a run: names, paths and numbers, never a row or a secret.

    Attributes:
        model: as `--model` takes it; None for the embedded one.
        dataset: as `--dataset` takes it; none for the embedded rows.
        shape: of these, as `mst data check` names it; "" when not looked at.
        rows: how many; 0 when not looked at.
        answers: different answers of a classification; None when it is none.
        goal: of `GOALS`; "" for what suits the data.
        options: of `mst train`, as text, by their names.
        key_file: of encrypted data.
    """

    model: str | None = None
    dataset: tuple[str, ...] = ()
    shape: str = ""
    rows: int = 0
    answers: int | None = None
    goal: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    key_file: str | None = None


def default_path() -> Path:
    """Return where the choices are kept."""
    import platformdirs

    return platformdirs.user_state_path("mst") / "menu.json"


def load(path: Path) -> Draft:
    """Return the choices that were kept; none where there are none, or they can't be read."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        plain: Any = json.loads(path.read_text(encoding="utf-8"))
        known = {each.name for each in fields(Draft)}
        kept = {name: value for name, value in plain.items() if name in known}
        kept["dataset"] = tuple(map(str, kept.get("dataset", ())))
        kept["options"] = {str(k): str(v) for k, v in dict(kept.get("options", {})).items()}
        return Draft(**kept)
    return Draft()


def save(path: Path, draft: Draft) -> None:
    """Keep the choices; where that can't be done, the menu goes on without."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In ASCII: a path need not be UTF-8.
        write_text(path, json.dumps(asdict(draft)) + "\n", 0o600)


def suited_goal(draft: Draft) -> str:
    """Return the goal that the data suggest; the embedded rows are a classification."""
    if not draft.dataset or draft.answers is not None:
        return CLASSIFICATION
    if draft.shape in _JUDGED:
        return PREFERENCE
    return STYLE if draft.shape == "text" else ANSWERING


def goal_of(draft: Draft) -> str:
    """Return the goal: the chosen one while it can be reached, else the one that suits."""
    return draft.goal if draft.goal and reachable(draft, draft.goal) else suited_goal(draft)


def reachable(draft: Draft, goal: str) -> bool:
    """Return whether the data have what a goal needs."""
    if goal == PREFERENCE:
        return draft.shape in _JUDGED
    if goal == CLASSIFICATION:
        return suited_goal(draft) == CLASSIFICATION
    return draft.shape not in _JUDGED and (goal == STYLE or draft.shape != "text")


def arguments(draft: Draft, quick: bool = False) -> list[str]:
    """Return the options of `mst train` and `mst plan` that say what was chosen.

    Args:
        draft: the choices.
        quick: a few steps are enough, to see the whole way.
    """
    found: list[str] = []
    if draft.model is not None:
        found += ["--model", draft.model]
    if draft.dataset:
        found += ["--dataset", *draft.dataset]
    if draft.key_file is not None:
        found += ["--key-file", draft.key_file]
    goal = goal_of(draft)
    if goal == CLASSIFICATION and not quick:
        found += ["--label-accuracy", "on"]
    if goal == STYLE:
        found += ["--task", "pt"] if draft.shape == "text" else ["--train-on", "all"]
    if goal == PREFERENCE:
        found += ["--task", _JUDGED[draft.shape]]
    for name, value in draft.options.items():
        found += [f"--{name.replace('_', '-')}", value]
    if quick:
        found += ["--max-steps", str(QUICK_STEPS), "--label-accuracy", "off"]
    return found
