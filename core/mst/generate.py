"""Generating an answer token by token, so that it can be shown, or stopped, at any token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from mst.data.text_stream import TextStream
from mst.one_row import one_row, reads_half
from mst.training.loss import last_logits

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from mst.chat import Sampling

# Below it a logit over the temperature overflows float32, and at it the likeliest token is certain;
# vLLM's bound too (`_SAMPLING_EPS` of its sampling_params.py).
LEAST_TEMPERATURE = 1e-5


def generate(
    model: torch.nn.Module, prompt: Sequence[int], stop: Collection[int], sampling: Sampling
) -> Iterator[int]:
    """Yield the answer's token ids as they come, without the one that ends it.

    Greedy answers equal those of transformers' `generate`.

    Args:
        model: a causal language model of transformers, on its device.
        prompt: token ids up to where the model answers; at least one.
        stop: ids that end the answer.
        sampling: how tokens are chosen.
    """
    import torch

    device = next(model.parameters()).device
    # Its own generator, on the host: the same draws on every device.
    generator = torch.Generator().manual_seed(sampling.seed)
    last_only, halves = last_logits(model, device), reads_half(model, device)
    tokens, cache = torch.tensor([list(prompt)], device=device), None
    for _ in range(sampling.max_new_tokens):
        with torch.inference_mode(), one_row(halves and tokens.numel() == 1):
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True, **last_only)
            token = _choose(out.logits[0, -1].float().cpu(), sampling, generator)
        if token in stop:
            return
        yield token
        tokens, cache = torch.tensor([[token]], device=device), out.past_key_values


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature < LEAST_TEMPERATURE:
        return int(logits.argmax())
    probabilities, ids = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    # Kept: the first, and every token before which less than top_p has been gathered.
    kept = probabilities * (probabilities.cumsum(-1) - probabilities < sampling.top_p)
    kept[0] = probabilities[0]
    return int(ids[kept.multinomial(1, generator=generator)])


def as_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of token ids as soon as whole characters are known."""
    stream = TextStream(tokenizer)
    for token in ids:
        piece = stream.push(token)
        if piece:
            yield piece
