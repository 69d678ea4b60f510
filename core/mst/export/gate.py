"""What an exported model must fulfil before it is called done: each fault in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.data.tokens import TOKENIZER_FILES
from mst.export import Bounds
from mst.export.figures import Distance

if TYPE_CHECKING:
    import torch

# Merged and unmerged, both in float32, a model's logits differ by rounding alone: 5e-5 were
# measured on SmolLM2-135M.
MERGED_LOGITS = 1e-3
_TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"
# What a target may say of itself in config.json; all else is the model's.
_OWN_CONFIG = frozenset({"quantization_config", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True)
class Answers:
    """Right answers of a model beside those of the trained one, to the same questions.

    Attributes:
        asked: how many questions.
        right: share of right answers.
        trained_right: of the trained model.
        error: standard error of the difference, from the questions that one of them alone answers
            rightly (McNemar 1947).
    """

    asked: int
    right: float
    trained_right: float
    error: float


def compared(trained: Sequence[bool], candidate: Sequence[bool]) -> Answers | None:
    """Return how right two models are on the same questions; None without any."""
    asked = len(trained)
    if not asked:
        return None
    unlike = sum(a != b for a, b in zip(trained, candidate, strict=True))
    return Answers(asked, sum(candidate) / asked, sum(trained) / asked, math.sqrt(unlike) / asked)


@dataclass(frozen=True)
class Quality:
    """What was measured of an exported model.

    Attributes:
        model: beside the trained one, both in float32.
        rounding: plain rounding to the same scheme, beside the trained one; None where the target
            has none, or is itself that.
        answers: right ones, where the run's data is a classification.
    """

    model: Distance
    rounding: Distance | None = None
    answers: Answers | None = None


def quality_faults(found: Quality, bounds: Bounds) -> list[str]:
    """Return which bounds a model breaks, with the figures."""
    model, faults = found.model, []
    if not model.perplexity_ratio <= bounds.perplexity_ratio:
        faults.append(
            f"perplexity is {model.perplexity_ratio:.4g} times the trained model's, at most"
            f" {bounds.perplexity_ratio:g} are allowed"
        )
    if not model.trained_ratio <= bounds.perplexity_ratio:
        faults.append(
            f"perplexity on answers is {model.trained_ratio:.4g} times the trained model's, at most"
            f" {bounds.perplexity_ratio:g} are allowed"
        )
    if not model.mean_kl <= bounds.mean_kl:
        faults.append(
            f"the next token's distribution diverges by {model.mean_kl:.4g} nats, at most"
            f" {bounds.mean_kl:g} are allowed"
        )
    if not model.agreement >= bounds.agreement:
        faults.append(
            f"the likeliest token is the trained model's at {model.agreement:.2%}, at least"
            f" {bounds.agreement:.0%} are wanted"
        )
    answers = found.answers
    if answers is not None:
        lost = answers.trained_right - answers.right
        # Beyond what chance does to so few questions, one time in twenty.
        if lost - 1.64 * answers.error > bounds.accuracy_loss:
            faults.append(
                f"right answers fell from {answers.trained_right:.1%} to {answers.right:.1%} of"
                f" {answers.asked}, by more than {bounds.accuracy_loss:.0%}"
            )
    beaten = found.rounding is None or model.mean_kl < found.rounding.mean_kl
    if bounds.beats_rounding and not beaten:
        assert found.rounding is not None
        faults.append(
            f"plain rounding to the same scheme diverges by less: {found.rounding.mean_kl:.4g}"
            f" nats against {model.mean_kl:.4g}. Pass more or other --calibration rows, or"
            " --method rtn"
        )
    return faults


def put_weights(model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Put what an artefact computes with into a model of the same shape, and return what is wrong.

    Every weight must be given once, in its shape, and finite; a head that is tied to the embedding
    may be left out.

    Args:
        model: what was trained, merged; changed in place.
        weights: name and value, as transformers names them.
    """
    import torch

    own: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    seen: set[int] = set()
    faults = []
    with torch.no_grad():
        for name, value in weights:
            if name not in own:
                faults.append(f"{name} is no weight of the trained model")
            elif value.shape != own[name].shape:
                found, wanted = tuple(value.shape), tuple(own[name].shape)
                faults.append(f"{name} has the shape {found}, which was {wanted}")
            elif not bool(torch.isfinite(value).all()):
                faults.append(f"{name} holds NaN or infinity")
            else:
                own[name].copy_(value)
            if name in own:
                seen.add(id(own[name]))
    faults += [f"{name} is missing" for name, each in own.items() if id(each) not in seen]
    return faults


def weight_faults(trained: torch.nn.Module, candidate: torch.nn.Module, most: float) -> list[str]:
    """Return which weights are further from the trained model's than rounding explains.

    One layer with a wrong scale hardly shows in the figures of a deep model.

    Args:
        trained: the merged model.
        candidate: with the artefact's weights.
        most: norm of the difference over the weight's norm.
    """
    faults = []
    pairs = zip(trained.named_parameters(), candidate.parameters(), strict=True)
    for (name, own), other in pairs:
        size = own.detach().norm().clamp(min=1e-12)
        error = float((other.detach() - own.detach()).norm() / size)
        if not error <= most:
            faults.append(
                f"{name} differs from what was trained by {error:.3g} of its size, at most"
                f" {most:g} are allowed"
            )
    return faults


def side_faults(directory: Path, merged: Path) -> list[str]:
    """Return how tokenizer, template, stop tokens or config differ from the merged model's.

    Args:
        directory: of the artefact, as transformers loads it.
        merged: of the merged model.
    """
    faults = [
        f"{name} is not the merged model's"
        for name in (*TOKENIZER_FILES, _TEMPLATE)
        if _text(directory / name) != _text(merged / name)
    ]
    ours, theirs = (_json(each / _GENERATION).get("eos_token_id") for each in (directory, merged))
    if ours != theirs:
        faults.append(f"{_GENERATION} stops at {ours}, the merged model at {theirs}")
    config, wanted = (_json(each / "config.json") for each in (directory, merged))
    faults += [
        f"config.json: {name} is {config.get(name)!r}, in the merged model {wanted.get(name)!r}"
        for name in sorted({*config, *wanted} - _OWN_CONFIG)
        if config.get(name) != wanted.get(name)
    ]
    return faults


def _text(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def merge_faults(max_logit_difference: float, same_answers: int, answers: int) -> list[str]:
    """Return how a merge in float32 differs from base and adapter."""
    faults = []
    if not max_logit_difference <= MERGED_LOGITS or not math.isfinite(max_logit_difference):
        faults.append(
            f"a logit of the merged model differs by {max_logit_difference:.3g}, at most"
            f" {MERGED_LOGITS:g} are allowed"
        )
    if same_answers < answers:
        faults.append(f"{answers - same_answers} of {answers} greedy answers differ")
    return faults


def lost_words(share: float, dtype: str) -> str:
    """Return why a cast merge is no good, and what to do.

    Args:
        share: of the values that training has changed, those that are the base's again.
        dtype: of the cast.
    """
    return (
        f"the reason: {share:.0%} of the values that training has changed are the base's again in"
        f" {dtype}, which can't hold changes as small as few steps make. Pass --dtype float32 and a"
        " new --output-dir, or train for more steps"
    )
