"""`grpo`: answers that the model samples, better ones of a group against worse ones, by rewards."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mst.data.encode import IGNORE, Example
from mst.data.rows import Row
from mst.errors import UsageError
from mst.objective import Draw, Micro, Objective, Part, Passes, Prelude, label_count
from mst.request import TrainRequest
from mst.training.rewards import Reward, Turns, find_rewards

if TYPE_CHECKING:
    import torch

LOSS_TYPES = ("dapo", "grpo", "dr_grpo")
# What TRL adds to a group's standard deviation.
EPSILON = 1e-4


@dataclass(frozen=True)
class Completion(Example):
    """A prompt with a sampled answer, whose tokens have labels.

    Attributes:
        advantage: its reward beside those of its group.
        rewards: of each judge, without its weight.
        reward: their weighted sum.
        spread: standard deviation of the group's rewards.
        cut: the answer was not ended by the model.
    """

    advantage: float = 0.0
    rewards: tuple[float, ...] = ()
    reward: float = 0.0
    spread: float = 0.0
    cut: bool = False


@dataclass(frozen=True)
class Settings:
    """What the objective goes by.

    Attributes:
        rewards: what judges answers.
        group: answers to each prompt.
        longest: answer, in tokens.
        beta: strength of the reference; 0 for none.
        kind: of `LOSS_TYPES`.
        seed: of the run.
    """

    rewards: tuple[Reward, ...]
    group: int
    longest: int
    beta: float
    kind: str
    seed: int


def make(request: TrainRequest) -> Objective:
    """Return the objective.

    Raises:
        UsageError: there is no such `loss_type`, no reward, or rows are to be packed.
    """
    kind = request.loss_type or LOSS_TYPES[0]
    if kind not in LOSS_TYPES:
        raise UsageError(
            f"--loss-type {kind} was asked for; grpo has {', '.join(LOSS_TYPES)}. Pass one of"
            " these."
        )
    if request.packing:
        raise UsageError(
            "--packing was asked for with --task grpo, which reads answers whose lengths nobody"
            " knows beforehand. Leave it out: short answers share lines anyway."
        )
    settings = Settings(
        rewards=find_rewards(request),
        group=request.num_generations,
        longest=request.max_completion_length,
        beta=request.beta or 0.0,
        kind=kind,
        seed=request.seed,
    )
    return Objective(
        name=request.task,
        lacks=_lacks,
        counts=lambda example: {"completions": float(settings.group)},
        loss=partial(_loss, settings=settings),
        sequences=partial(_sequences, settings=settings),
        usable=lambda example: label_count(example) > 0,
        before=partial(_before, settings=settings),
        reference=settings.beta > 0,
        train_on="last",
        samples=settings.longest,
        temperature=request.temperature,
        goal="reward",
    )


def _lacks(row: Row) -> str:
    if row.rejected:
        return "is a preference, of which grpo would not see the worse answer: pass --task dpo"
    if row.desirable is not None:
        return "says whether its answer is desirable, which grpo would not see: pass --task kto"
    if not row.messages or row.messages[-1].role != "assistant":
        return (
            "does not end with an answer, which rewards are told as the reference: add one, or pass"
            " --task pt for plain text"
        )
    return ""


def prompt_of(example: Example) -> array[int]:
    """Return the tokens of a row before its last answer."""
    begins = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:begins]


def _sequences(example: Example, settings: Settings) -> tuple[Example, ...]:
    """Return a completion; of a row as many as will be sampled, as long as they can get."""
    if isinstance(example, Completion):
        return (example,)
    prompt = prompt_of(example)
    longest = prompt[-1:] * settings.longest
    stand_in = Example(prompt + longest, array("i", [IGNORE]) * len(prompt) + longest, example.row)
    return (stand_in,) * settings.group


def _before(
    step: Sequence[Example], places: Sequence[int], passes: Passes, *, settings: Settings
) -> Prelude:
    """Sample and judge answers to the prompts of a micro-batch."""
    prompts = [prompt_of(step[place]) for place in places]
    draws = [
        Draw(prompt, f"{settings.seed} {passes.step} {place} {number}")
        for prompt, place in zip(prompts, places, strict=True)
        for number in range(settings.group)
    ]
    answers = passes.sample(draws)
    rows = [step[place].row for place in places for _ in range(settings.group)]
    judged = judge(settings.rewards, rows, [passes.text(each.tokens) for each in answers])
    found: list[Completion] = []
    for first in range(0, len(draws), settings.group):
        members = range(first, first + settings.group)
        totals = [_weighted(settings.rewards, judged[i]) for i in members]
        for i, total, gain in zip(members, totals, advantages(totals), strict=True):
            prompt, answer = array("i", draws[i].prompt), array("i", answers[i].tokens)
            found.append(
                Completion(
                    input_ids=prompt + answer,
                    labels=array("i", [IGNORE]) * len(prompt) + answer,
                    row=rows[i],
                    advantage=gain,
                    rewards=judged[i],
                    reward=total,
                    spread=statistics.stdev(totals),
                    cut=answers[i].cut,
                )
            )
    return Prelude(found, {"completion tokens": float(sum(map(label_count, found)))})


def judge(
    rewards: Sequence[Reward], rows: Sequence[Row], answers: Sequence[str]
) -> list[tuple[float, ...]]:
    """Return what each judge says of each answer.

    Args:
        rewards: the judges.
        rows: of each answer; their last turn is the reference.
        answers: as text.

    Raises:
        TrainingError: a user's function fails.
    """
    prompts: list[Turns] = [
        [{"role": each.role, "content": each.content} for each in row.messages[:-1]] for row in rows
    ]
    references = [row.messages[-1].content for row in rows]
    return list(zip(*(each.judge(prompts, answers, references) for each in rewards), strict=True))


def _weighted(rewards: Sequence[Reward], found: Sequence[float]) -> float:
    return sum(each.weight * value for each, value in zip(rewards, found, strict=True))


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return how far each reward of a group lies above the others, in standard deviations.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2, "outcome supervision".
    """
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(each - mean) / (spread + EPSILON) for each in rewards]


def _loss(micro: Micro, *, settings: Settings) -> Part:
    """Return the part of the loss.

    Each batch is sampled anew from the model that learns from it, so the ratio of the two
    policies is 1 and clipping it would change nothing; its gradient is that of the likelihood. It
    multiplies the KL term too, whose gradient would leave out how likely each token is.

    Source: Shao et al. 2024, "DeepSeekMath", equations 3 and 4, with one update a batch; "dapo":
    Yu et al. 2025, "DAPO", equation 8; "dr_grpo": Liu et al. 2025, "Understanding R1-Zero-Like
    Training", section 3.2; the KL term: DeepSeek-AI 2025, "DeepSeek-V3.2", section 3.1, which TRL
    1.16 follows.
    """
    import torch

    policy, totals = micro.policy, micro.totals
    completions = [each for each in micro.examples if isinstance(each, Completion)]
    count = totals["completions"]

    def mean(values: Sequence[float]) -> torch.Tensor:
        return policy.log_probs.new_tensor(sum(values)) / count

    gains = policy.log_probs.new_tensor([each.advantage for each in completions])
    ratios = torch.exp(policy.log_probs - policy.log_probs.detach())
    losses = -ratios * gains[:, None] * policy.weights
    metrics = {
        "reward": mean([each.reward for each in completions]),
        "reward_std": mean([each.spread for each in completions]),
        "completion_length": mean([float(label_count(each)) for each in completions]),
        "completions_cut": mean([float(each.cut) for each in completions]),
    }
    if len(settings.rewards) > 1:
        for place, each in enumerate(settings.rewards):
            said = [one.rewards[place] for one in completions]
            metrics[f"rewards/{each.name}"] = mean(said)
    if micro.reference is not None:
        apart = micro.reference.log_probs - policy.log_probs
        kl = (torch.exp(apart) - apart - 1) * policy.weights
        losses = losses + settings.beta * ratios * kl
        metrics["kl"] = kl.detach().sum() / totals["completion tokens"]
    return Part(_averaged(losses, micro, settings), metrics)


def _averaged(losses: torch.Tensor, micro: Micro, settings: Settings) -> torch.Tensor:
    """Return the part of the mean over tokens, or over answers."""
    count = micro.totals["completions"]
    if settings.kind == "grpo":
        return (losses.sum(-1) / micro.policy.lengths).sum() / count
    if settings.kind == "dr_grpo":
        return losses.sum() / (count * settings.longest)
    return losses.sum() / micro.totals["completion tokens"]
