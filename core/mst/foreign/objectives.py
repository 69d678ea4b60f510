"""What is learnt: the task, and what preference objectives take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mst.foreign.draft import Draft, number, truth
from mst.request import fields

PREFERENCES = ("dpo", "kto", "orpo", "simpo", "rm")
# Our options by what the tools call them.
_NUMBERS = {
    "beta": ("beta", "pref_beta", "rl_beta", "dpo_beta"),
    "simpo_gamma": ("simpo_gamma",),
    "label_smoothing": ("label_smoothing", "dpo_label_smoothing"),
    "rpo_alpha": ("rpo_alpha", "pref_ftx"),
    "desirable_weight": ("desirable_weight", "kto_desirable_weight", "kto_chosen_weight"),
    "undesirable_weight": ("undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight"),
}
# The tasks that read each of them; a value for another task says nothing.
_READ_BY = {
    "beta": ("dpo", "kto", "orpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "label_smoothing": ("dpo",),
    "rpo_alpha": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
_DPO_LOSSES = ("sigmoid", "hinge", "ipo")


def task(draft: Draft, name: str, key: str) -> None:
    """Write the task; one that mst has not is reported."""
    if name in ("sft", "pt", *PREFERENCES) and "task" in fields():
        draft.keep("task", name, key)
    elif name != "sft":
        reason = f"mst's tasks are sft, pt, {', '.join(PREFERENCES)}"
        if name == "grpo":
            reason = "rewards are not carried over: mst grpo takes them with --reward-funcs"
        draft.drop(
            key, reason if "task" in fields() else "mst trains on answers only", "changes", "task"
        )


def preference(draft: Draft, name: str) -> None:
    """Write what a preference objective takes; for other tasks it says nothing."""
    for option, keys in _NUMBERS.items():
        key, value = draft.spelt(*keys), draft.take(*keys)
        if value is None or name not in _READ_BY[option]:
            continue
        # `rpo_alpha: 0` asks for nothing, so mst needs no such option.
        if option in fields() or number(value) != 0:
            draft.keep(option, value, key)
    _loss(draft, name)
    if truth(draft.take("precompute_ref_log_probs")) and name == "dpo":
        draft.keep("precompute_ref_log_probs", True, "precompute_ref_log_probs")


def _loss(draft: Draft, name: str) -> None:
    key = draft.spelt("loss_type", "dpo_loss_type", "pref_loss")
    found = draft.take("loss_type", "dpo_loss_type", "pref_loss")
    kinds = [str(each) for each in (found if isinstance(found, list) else [found])]
    if found is None or (key == "pref_loss" and name != "dpo"):
        return  # LLaMA-Factory reads pref_loss for dpo alone
    if name == "dpo" and len(kinds) == 1 and kinds[0] in _DPO_LOSSES:
        draft.keep("loss_type", kinds[0], key)
    elif name == "dpo":
        draft.drop(key, f"mst's losses of dpo are {', '.join(_DPO_LOSSES)}", "changes", "loss_type")
    elif kinds != [name] and kinds[0] not in ("nll", "chunked_nll"):
        draft.drop(key, f"mst has one loss for {name}", "changes")


def simpo_with_likelihood(draft: Draft, name: str) -> None:
    """Report TRL's default of SimPO, which adds the better answer's likelihood to the loss."""
    weight = draft.take("cpo_alpha")
    if name == "simpo" and (weight is None or number(weight) != 0):
        draft.drop(
            "cpo_alpha",
            "theirs adds the better answer's likelihood, 1 unless it is given as 0; mst's simpo is"
            " the paper's",
            "changes",
        )


def default_beta(options: Mapping[str, Any]) -> float | None:
    """Return the beta that all but ms-swift's SimPO have where none is given."""
    return 0.1 if options.get("task") in _READ_BY["beta"] else None


def default_train_on(options: Mapping[str, Any]) -> str | None:
    """Return the turns that preference objectives look at where nothing is said: the last."""
    return "last" if options.get("task") in PREFERENCES else None


def packing(draft: Draft, wanted: bool, key: str) -> None:
    """Write whether rows share a sequence; they never see each other here."""
    if not wanted:
        return
    if "packing" in fields():
        choices = fields()["packing"].metadata["choices"]
        draft.keep("packing", "on" if "on" in choices else True, key)
    else:
        draft.drop(key, "rows share a sequence where that is faster; none sees another")
