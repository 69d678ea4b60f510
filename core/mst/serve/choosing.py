"""The next token of each answer in a batch; what one gets does not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst.generate import LEAST_TEMPERATURE
from mst.serve.answers import Answer
from mst.serve.engine import EngineFailure

if TYPE_CHECKING:
    import torch

# Most draws with top_p fall among so many of the likeliest tokens; sorting all of 49,152 for 32
# answers took longer than the model itself.
_LIKELIEST = 256


@dataclass(frozen=True)
class Chosen:
    """A token and what was asked about it, as `mst.serve.engine.Token` has it."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: torch.Tensor, answers: Sequence[Answer]) -> list[Chosen | EngineFailure]:
    """Return the next token of each answer, or why there is none.

    Args:
        logits: of the last position (answers, vocabulary), of any dtype.
        answers: in the same order; their draws and constraints go on.
    """
    raw = logits.float()
    failures: dict[int, EngineFailure] = {}
    allowed = _constrained(_adjusted(raw, answers), answers, failures)
    ids = allowed.argmax(-1).tolist()
    warm = [each.choice.temperature >= LEAST_TEMPERATURE for each in answers]
    drawn = [place for place, each in enumerate(warm) if each]
    whole = [place for place in drawn if answers[place].choice.top_p >= 1]
    cut = [place for place in drawn if answers[place].choice.top_p < 1]
    for places, draw in ((whole, _draw), (cut, _draw_likeliest)):
        if places:
            picked = [answers[place] for place in places]
            for place, token in zip(places, draw(allowed[places], picked), strict=True):
                ids[place] = token
    for place, each in enumerate(answers):
        if each.constraint is not None and place not in failures:
            try:
                each.constraint.take(ids[place])
            except EngineFailure as failure:
                failures[place] = failure
    chosen = _described(raw, ids, answers)
    return [failures.get(place, each) for place, each in enumerate(chosen)]


def _adjusted(raw: torch.Tensor, answers: Sequence[Answer]) -> torch.Tensor:
    """Return the logits with each answer's biases and penalties, as OpenAI's API defines them.

    Source: "Frequency and presence penalties" of OpenAI's API guide: mu[j] - c[j] * frequency -
    (c[j] > 0) * presence, with c[j] how often the answer has token j so far.
    """
    import torch

    choices = [each.choice for each in answers]
    penalized = [bool(each.presence_penalty or each.frequency_penalty) for each in choices]
    if not any(penalized) and not any(each.logit_bias for each in choices):
        return raw
    logits, size = raw.clone(), raw.shape[-1]
    for row, answer, choice, penalty in zip(logits, answers, choices, penalized, strict=True):
        biases = dict(each for each in choice.logit_bias if 0 <= each[0] < size)
        if biases:
            row[list(biases)] += torch.tensor(list(biases.values()), device=row.device)
        if penalty:
            own = torch.tensor(answer.ids[len(answer.prompt.ids) :], dtype=torch.long)
            tokens, counts = torch.unique(own.to(row.device), return_counts=True)
            row[tokens] -= counts * choice.frequency_penalty + choice.presence_penalty
    return logits


def _constrained(
    raw: torch.Tensor, answers: Sequence[Answer], failures: dict[int, EngineFailure]
) -> torch.Tensor:
    """Return the logits, -inf where a constraint forbids the token; note what can't go on."""
    import torch

    bound = [place for place, each in enumerate(answers) if each.constraint is not None]
    if not bound:
        return raw
    logits = raw.clone()
    for place in bound:
        constraint = answers[place].constraint
        assert constraint is not None
        try:
            kept = torch.from_numpy(constraint.allowed(raw.shape[-1]))
        except EngineFailure as failure:
            failures[place] = failure
            continue
        logits[place] = logits[place].masked_fill(~kept.to(raw.device), -torch.inf)
    return logits


def _probabilities(logits: torch.Tensor, answers: Sequence[Answer]) -> torch.Tensor:
    import torch

    temperatures = [each.choice.temperature for each in answers]
    return (logits / torch.tensor(temperatures, device=logits.device)[:, None]).softmax(-1)


def _points(answers: Sequence[Answer], device: torch.device) -> torch.Tensor:
    """Return a draw from [0, 1) for each answer (answers, 1)."""
    import torch

    # 24 bits are what float32 holds exactly: one that rounded to 1 would lie beyond every token.
    points = [each.draws.getrandbits(24) / (1 << 24) for each in answers]
    return torch.tensor(points, device=device)[:, None]


def _draw(logits: torch.Tensor, answers: Sequence[Answer]) -> list[int]:
    reached = _probabilities(logits, answers).cumsum(-1)
    # Rounding keeps what is reached at the end from being 1.
    points = _points(answers, logits.device) * reached[:, -1:]
    found: list[int] = (reached <= points).sum(-1).clamp(max=reached.shape[-1] - 1).tolist()
    return found


def _draw_likeliest(logits: torch.Tensor, answers: Sequence[Answer]) -> list[int]:
    import torch

    probabilities = _probabilities(logits, answers)
    points = _points(answers, logits.device)
    shares = torch.tensor([each.choice.top_p for each in answers], device=logits.device)[:, None]
    found: list[int] = []
    some, ids = probabilities.topk(min(_LIKELIEST, probabilities.shape[-1]))
    enough = (some.sum(-1, keepdim=True) >= shares).flatten().tolist()
    for row, fits in enumerate(enough):
        ordered, names = some[row], ids[row]
        if not fits:
            ordered, names = probabilities[row].sort(descending=True)
        reached = ordered.cumsum(-1)
        # Kept: the first, and every token before which less than top_p has been gathered.
        kept = max(1, int((reached - ordered < shares[row]).sum()))
        place = int((reached[:kept] <= points[row] * reached[kept - 1]).sum())
        found.append(int(names[min(place, kept - 1)]))
    return found


def _described(raw: torch.Tensor, ids: Sequence[int], answers: Sequence[Answer]) -> list[Chosen]:
    """Return the tokens with the log-probabilities that were asked for."""
    chosen = [Chosen(token) for token in ids]
    asked = [place for place, each in enumerate(answers) if each.choice.top_logprobs is not None]
    if not asked:
        return chosen
    logprobs = raw[asked].log_softmax(-1)
    most = max(answers[place].choice.top_logprobs or 0 for place in asked)
    values, names = logprobs.topk(min(most, raw.shape[-1]))
    for row, place in enumerate(asked):
        count = answers[place].choice.top_logprobs or 0
        likeliest = zip(names[row].tolist()[:count], values[row].tolist()[:count], strict=True)
        chosen[place] = Chosen(ids[place], float(logprobs[row, ids[place]]), tuple(likeliest))
    return chosen
