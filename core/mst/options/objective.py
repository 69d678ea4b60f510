"""What the model is trained for, and the numbers of each objective."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="objective")


@dataclass(frozen=True)
class ObjectiveOptions:
    """The group "objective" of `mst.request.TrainRequest`."""

    task: str = _option(
        "sft",
        "what it is trained for: sft, pt (plain text), dpo, kto, orpo, simpo, rm (reward model),"
        " grpo (rewards), or a plugin's",
        aliases=("stage", "rlhf_type"),
        metavar="NAME",
    )
    beta: float | None = _option(
        None,
        "strength of the reference (dpo, kto; default 0.1; grpo has none), of the odds ratio (orpo;"
        " 0.1), or scale of the rewards (simpo; 2)",
        aliases=("pref_beta", "rlhf_beta"),
        above=0,
    )
    loss_type: str | None = _option(
        None,
        "of dpo: sigmoid (default), hinge or ipo; of grpo: dapo (default), grpo or dr_grpo",
        aliases=("pref_loss",),
        metavar="NAME",
    )
    label_smoothing: float = _option(
        0.0,
        "share of preferences taken to be the wrong way round (dpo with sigmoid, simpo)",
        aliases=("dpo_label_smoothing",),
        at_least=0,
        below=0.5,
    )
    simpo_gamma: float = _option(0.5, "margin that simpo wants between the rewards", at_least=0)
    rpo_alpha: float = _option(
        0.0,
        "weight of the better answer's likelihood, added to dpo",
        aliases=("pref_ftx",),
        at_least=0,
    )
    desirable_weight: float = _option(
        1.0, "weight of desirable answers in kto", aliases=("kto_chosen_weight",), above=0
    )
    undesirable_weight: float = _option(
        1.0, "weight of undesirable answers in kto", aliases=("kto_rejected_weight",), above=0
    )
    precompute_ref_log_probs: bool = _option(
        False,
        "of dpo: compute what the model says before training once, at the start; kept in memory",
    )
    reward_funcs: tuple[str, ...] = _option(
        (),
        "of grpo: what judges answers: exact_match, exact_match_folded, json_valid, or"
        " FILE.py:FUNCTION",
        metavar="NAME|FILE",
    )
    reward_weights: tuple[str, ...] = _option(
        (), "of grpo: factor of each of --reward-funcs; default 1", metavar="NUMBER"
    )
    num_generations: int = _option(
        8, "of grpo: answers that are sampled to each prompt", at_least=2
    )
    max_completion_length: int = _option(
        256, "of grpo: longest sampled answer in tokens", at_least=1
    )
    temperature: float = _option(1.0, "of grpo: at which answers are sampled", above=0)
