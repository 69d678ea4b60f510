"""Does this model give in a batch what it gives alone? Asked of the model itself, beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mst.errors import ModelError
from mst.serve.answers import Answer
from mst.serve.decoders import AloneDecoder, BatchedDecoder, Decoder, Served
from mst.serve.engine import Choice, Prompt
from mst.serve.row_adapters import MixedRows
from mst.training.adapters import under_adapters
from mst.training.faults import is_out_of_memory

if TYPE_CHECKING:
    import torch

# An answer's error must be this much smaller than the error when it does see what is not its own:
# in front, or among its last tokens, which matters to windows that are shorter than a probe.
_MARGIN_IN_FRONT, _MARGIN_NEAR = 0.1, 0.02
# Rounding may hide no more than this share of what tokens in front do.
_MOST_ROUNDING = 0.5
_DRAWS = 2
_FIRST, _LATER, _STEPS = (13, 7), 10, 2
# What forward passes raise that were not written for this.
_UNFIT = (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError)
# Rotary frequencies of these depend on how long the longest row is (Phi-3's long contexts).
_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Way:
    """How a model's answers are computed.

    Attributes:
        decoder: that computes them.
        vocab_size: of the model's logits.
        reason: why not all in one batch; None if they are.
    """

    decoder: Decoder
    vocab_size: int
    reason: str | None = None


def way_of(served: Served, context: int) -> Way:
    """Return the fastest way in which the model gives what it gives alone.

    Args:
        served: the model.
        context: longest conversation.

    A few tokens are computed without a cache, as the model was trained; then in a batch that others
    join, and alone with the model's own cache. As in `mst.training.isolation`, errors are measured
    against what the model gives where it sees what is not its own: in bfloat16 no absolute
    tolerance would do. Where one rounding of the embeddings changes more, that is what is allowed:
    a tuned classifier hears little of what is in front of a text, and rounds as any other model.

    Raises:
        ModelError: it can't compute plain text.
    """
    import torch

    from mst.serve.slots import OtherCache

    probes = [_probe(served, place, length) for place, length in enumerate((*_FIRST, _LATER))]
    try:
        expected = torch.stack([_whole(served, each) for each in probes])
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        kind = type(under_adapters(served.model)).__name__
        raise ModelError(
            f"this model ({kind}) can't go on from text alone:"
            f" its forward pass raises {type(error).__name__}. Serve a causal language model."
        ) from None
    allowed = _allowed(served, probes, expected)
    reason = _by_length(under_adapters(served.model).config, context)
    if reason is None:
        try:
            own_steps = served.steps is not None and _fits(
                lambda: BatchedDecoder(served), probes, expected, allowed
            )
            if own_steps or _agree(BatchedDecoder(served, False), probes, expected, allowed):
                return Way(BatchedDecoder(served, own_steps), expected.shape[-1])
            reason = "its answers in a batch differ from those alone"
        except OtherCache as error:
            reason = str(error)
        except MixedRows:
            reason = "its layers don't keep rows apart, so that adapters can't be mixed"
        except _UNFIT as error:
            if is_out_of_memory(error):
                raise
            reason = f"its forward pass can't be run in such a batch ({type(error).__name__})"
    cached = _fits(lambda: AloneDecoder(served), probes, expected, allowed)
    if not cached:
        reason += ", and its own cache makes other answers than none"
    return Way(AloneDecoder(served, cached), expected.shape[-1], reason)


def _by_length(config: Any, context: int) -> str | None:
    """Return why rows of other lengths change a row's rotary frequencies; None if they don't."""
    found = config.get_text_config(decoder=True).to_dict().get("rope_parameters") or {}
    for each in (found, *found.values()):
        if not isinstance(each, dict) or each.get("rope_type") not in _BY_LENGTH:
            continue
        if context > each.get("original_max_position_embeddings", 0):
            return f"its positions depend on the batch's longest row ({each['rope_type']})"
    return None


def _probe(served: Served, place: int, length: int) -> Answer:
    """Return an answer with random tokens, those of its steps included."""
    import torch

    vocab_size = under_adapters(served.model).get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(place)
    ids = torch.randint(0, vocab_size, (length + _STEPS,), generator=generator).tolist()
    names = served.adapters.names or [None]
    name = names[place % len(names)]
    prompt = Prompt(tuple(ids), Choice(max_new_tokens=1), adapter=name)
    return Answer(place, prompt, lambda _: None, room=1)


def _whole(served: Served, probe: Answer) -> torch.Tensor:
    logits = served.logits([probe.ids], [probe.prompt.adapter], use_cache=False)
    return logits[0].float()


def _contaminated(served: Served, probes: Sequence[Answer], place: int) -> torch.Tensor:
    """Return the logits of each probe with tokens that are not its own before a place in it."""
    import torch

    other = probes[0].ids[:5]
    rows = [
        served.logits(
            [each.ids[:place] + other + each.ids[place:]], [each.prompt.adapter], use_cache=False
        )
        for each in probes
    ]
    return torch.cat(rows).float()


def _allowed(served: Served, probes: Sequence[Answer], expected: torch.Tensor) -> torch.Tensor:
    """Return the largest error that each probe's logits may have on average (probes)."""
    import torch

    front, near = (
        (_contaminated(served, probes, place) - expected).abs().mean(-1) for place in (0, -2)
    )
    rounding = max(_rounding(served, probes, expected, seed) for seed in range(_DRAWS))
    return torch.maximum(
        torch.maximum(_MARGIN_IN_FRONT * front, _MARGIN_NEAR * near),
        (_MOST_ROUNDING * front).clamp(max=rounding),
    )


def _rounding(served: Served, probes: Sequence[Answer], expected: torch.Tensor, seed: int) -> float:
    """Return how much logits change on average once embeddings are a step of their dtype away."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def nudge(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        step = max(torch.finfo(each).eps for each in (output.dtype, served.dtype))
        signs = torch.randint(0, 2, output.shape, generator=generator).mul_(2).sub_(1)
        return (output.float() * (1 + step * signs.to(output.device))).to(output.dtype)

    embeddings = under_adapters(served.model).get_input_embeddings()
    hook = embeddings.register_forward_hook(nudge)
    try:
        found = torch.stack([_whole(served, each) for each in probes])
    finally:
        hook.remove()
    return float((found - expected).abs().mean())


def _agree(
    decoder: Decoder, probes: Sequence[Answer], expected: torch.Tensor, allowed: torch.Tensor
) -> bool:
    """Return whether a decoder gives the expected logits: some begin together, one joins later."""
    full = [list(each.ids) for each in probes]

    def shorten(answers: Sequence[Answer], tokens: int) -> None:
        for each in answers:
            ids = full[probes.index(each)]
            each.ids = ids[: len(ids) - tokens]

    early, late = probes[:-1], probes[-1:]
    try:
        shorten(early, 2)
        _begin(decoder, early)
        shorten(early, 1)
        decoder.step()
        shorten(late, 1)
        _begin(decoder, late)
        shorten(probes, 0)
        error = (decoder.step().float() - expected).abs().mean(-1)
    finally:
        shorten(probes, 0)
    return bool((error <= allowed).all())


def _fits(
    make: Callable[[], Decoder],
    probes: Sequence[Answer],
    expected: torch.Tensor,
    allowed: torch.Tensor,
) -> bool:
    """Return whether a decoder gives the expected logits; not where the model can't be run so."""
    try:
        return _agree(make(), probes, expected, allowed)
    except _UNFIT as error:
        if is_out_of_memory(error):
            raise
        return False


def _begin(decoder: Decoder, answers: Sequence[Answer]) -> None:
    """Let answers run, together if the decoder can."""
    size = min(decoder.at_once, len(answers))
    for place in range(0, len(answers), size):
        group = answers[place : place + size]
        prefill = decoder.begin(group, [None] * len(group))
        while decoder.advance(prefill, _FIRST[0] + _STEPS) is None:
            pass
        decoder.join(prefill)
