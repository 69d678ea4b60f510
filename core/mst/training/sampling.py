"""Answers sampled from the model that is being trained, in the process that trains it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mst.objective import Answer, Draw, Objective
from mst.training.adapters import under_adapters
from mst.training.loss import compute_in, last_logits

if TYPE_CHECKING:
    import torch

    from mst.training.session import Session


def sampled(session: Session, draws: Sequence[Draw]) -> list[Answer]:
    """Return an answer to each prompt.

    No draw depends on the others, nor on torch's generators, which dropout goes by. What is
    sampled beside an answer may round its logits otherwise, though.

    Args:
        session: model, tokenizer, and an objective that samples.
        draws: prompts, padded here to one width.
    """
    import torch

    tokenizer, objective = session.tokenizer, session.objective
    assert tokenizer is not None
    whole: Any = session.model
    width = max(len(each.prompt) for each in draws)
    gaps = [width - len(each.prompt) for each in draws]
    ids = [
        [tokenizer.pad_token_id] * gap + list(each.prompt)
        for gap, each in zip(gaps, draws, strict=True)
    ]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    device = session.device
    inner = under_adapters(whole)
    own, training = inner.generation_config, whole.training
    inner.generation_config = _plain(tokenizer.eos_token_ids, tokenizer.pad_token_id)
    # Without dropout; layers that recompute activations would keep no cache in training mode.
    whole.eval()
    try:
        with torch.no_grad(), compute_in(whole, device.type, session.dtype):
            out = whole.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=objective.samples,
                **last_logits(whole, device),
                logits_processor=[
                    _chooser([each.seed for each in draws], width, objective, device)
                ],
            )
    finally:
        inner.generation_config = own
        whole.train(training)
    return [_ended(each, tokenizer.eos_token_ids) for each in out[:, width:].tolist()]


def _plain(stop: Sequence[int], pad_token_id: int) -> Any:
    """Return a configuration that leaves nothing to a model's own, which may cut or penalize."""
    import transformers

    untyped: Any = transformers
    return untyped.GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=list(stop), pad_token_id=pad_token_id
    )


def _chooser(
    seeds: Sequence[str], width: int, objective: Objective, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a processor of logits that leaves one token to choose: that which a draw falls on.

    transformers samples with torch's one generator, whose numbers depend on what else is in the
    batch; so it is asked for the likeliest token, of which there is one.
    """
    import torch

    drawn = [random.Random(seed) for seed in seeds]
    values = [[each.random() for each in drawn] for _ in range(objective.samples)]
    points = torch.tensor(values, device=device, dtype=torch.float32)

    def choose(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        reached = (logits.float() / objective.temperature).softmax(-1).cumsum(-1)
        # Of what is reached at the end, which rounding keeps from being 1.
        point = points[ids.shape[1] - width, :, None] * reached[:, -1:]
        token = (reached < point).sum(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)

    return choose


def _ended(ids: Sequence[int], stop: Sequence[int]) -> Answer:
    end = next((place + 1 for place, token in enumerate(ids) if token in stop), None)
    return Answer(tuple(ids[:end]), cut=end is None)


def text_of(session: Session, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens."""
    assert session.tokenizer is not None
    return session.tokenizer.decode(array("i", ids), skip_special_tokens=True)
