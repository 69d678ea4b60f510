"""The objectives that come with mst, by the name that `--task` takes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mst.errors import MstError, UsageError
from mst.objective import Objective
from mst.request import TrainRequest
from mst.seal.redaction import WITHHELD, place_of

if TYPE_CHECKING:
    from mst.registry import Registry

# Each of `mst.request.TASKS`, to the module here that makes it.
BUILT_IN: Mapping[str, str] = {
    "sft": "likelihood",
    "pt": "likelihood",
    "dpo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "simpo": "simpo",
    "rm": "reward",
    "grpo": "grpo",
}
# Options that shape an objective; one that an objective does not read is refused there.
LOSS_OPTIONS = (
    "beta", "loss_type", "label_smoothing", "simpo_gamma", "rpo_alpha", "desirable_weight",
    "undesirable_weight", "precompute_ref_log_probs", "reward_funcs", "reward_weights",
    "num_generations", "max_completion_length", "temperature",
)  # fmt: skip
TAKES: Mapping[str, frozenset[str]] = {
    "sft": frozenset(),
    "pt": frozenset(),
    "dpo": frozenset(
        {"beta", "loss_type", "label_smoothing", "rpo_alpha", "precompute_ref_log_probs"}
    ),
    "kto": frozenset({"beta", "desirable_weight", "undesirable_weight"}),
    "orpo": frozenset({"beta"}),
    "simpo": frozenset({"beta", "simpo_gamma", "label_smoothing"}),
    "rm": frozenset(),
    "grpo": frozenset(
        {
            "beta",
            "loss_type",
            "reward_funcs",
            "reward_weights",
            "num_generations",
            "max_completion_length",
            "temperature",
        }
    ),
}


def find_objective(request: TrainRequest, registry: Registry | None = None) -> Objective:
    """Return what the request trains for.

    Args:
        request: names it as `task`.
        registry: has the objectives of plugins; None knows the built-in ones alone.

    Raises:
        UsageError: there is no such objective, or an option is none of its own.
        PluginError: a plugin's fails.
    """
    if request.task in BUILT_IN:
        _check_options(request)
        module: Any = importlib.import_module(f"{__name__}.{BUILT_IN[request.task]}")
        made: Objective = module.make(request)
        return made
    if registry is not None and request.task in registry.objectives:
        return _of_plugin(request, registry)
    from mst.cli.options import nearest

    known = [*BUILT_IN, *(registry.objectives if registry else ())]
    raise UsageError(
        f"--task {request.task} was asked for; mst knows {', '.join(known)}."
        f"{nearest(request.task, known)} Pass one of these, or install the plugin that has it."
    )


def _of_plugin(request: TrainRequest, registry: Registry) -> Objective:
    from mst.registry import PluginError, guarded

    hooks = registry.objectives[request.task]
    failed = ""

    def make() -> object:
        nonlocal failed
        try:
            return hooks.mst_objective(request=request)
        except MstError:
            raise
        except Exception as error:  # it may have read rows, and quote them
            failed = place_of(error)
            return None

    found: object = guarded(make, None)
    if failed:
        raise PluginError(
            f"mst_objective of {request.task!r} raised {failed} ({WITHHELD}). Mend it there, or"
            " pass another --task."
        )
    if not isinstance(found, Objective):
        raise PluginError(
            f"mst_objective of {request.task!r} returned {type(found).__name__}, not"
            " mst.objective.Objective"
        )
    return found


def _check_options(request: TrainRequest) -> None:
    """Raise UsageError for an option that the objective would leave unread."""
    defaults = TrainRequest()
    for name in LOSS_OPTIONS:
        value = getattr(request, name)
        if value != getattr(defaults, name) and name not in TAKES[request.task]:
            flag = "--" + name.replace("_", "-")
            tasks = ", ".join(task for task, names in TAKES.items() if name in names)
            shown = " ".join(value) if isinstance(value, tuple) else value
            raise UsageError(
                f"{flag} {shown} was given with --task {request.task}, which does not read it"
                f" ({tasks} does). Leave it out, or pass another --task."
            )
