"""Greedy answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mst.evaluate.batching import batches, in_passes

if TYPE_CHECKING:
    import torch


def greedy_answers(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    pad_token_id: int,
    dtype: torch.dtype,
    lengths: Sequence[int],
    rows_at_most: int,
    tokens_at_most: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Return the greedy answer to each prompt, without what ends it.

    Prompts are padded at the left; transformers' `generate` takes the positions from the mask.

    Args:
        model: a causal language model of transformers, on its device.
        prompts: token ids up to where the model answers.
        stop: ids that end an answer.
        pad_token_id: fills what is padded.
        dtype: of the matrix products.
        lengths: longest answer to each prompt, in tokens.
        rows_at_most: in one pass.
        tokens_at_most: in one pass.
        progress: told after each pass how many prompts are done.
    """
    import torch

    from mst.training.adapters import under_adapters
    from mst.training.loss import compute_in, last_logits

    whole: Any = model
    device = next(model.parameters()).device
    inner = under_adapters(model)
    own, inner.generation_config = inner.generation_config, _greedy(stop, pad_token_id)

    def work(places: list[int]) -> list[list[int]]:
        chosen = [prompts[place] for place in places]
        width = max(map(len, chosen))
        ids = [[pad_token_id] * (width - len(each)) + list(each) for each in chosen]
        mask = [[0] * (width - len(each)) + [1] * len(each) for each in chosen]
        with torch.inference_mode(), compute_in(model, device.type, dtype):
            out = whole.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max(lengths[place] for place in places),
                **last_logits(model, device),
            )
        said = out[:, width:].tolist()
        return [
            _until(each, stop, lengths[place]) for each, place in zip(said, places, strict=True)
        ]

    found: dict[int, list[int]] = {}
    try:
        sizes = [len(each) + more for each, more in zip(prompts, lengths, strict=True)]
        for places, results in in_passes(
            device, batches(sizes, rows_at_most, tokens_at_most), work
        ):
            found |= zip(places, results, strict=True)
            progress(len(found))
    finally:
        inner.generation_config = own
    return [found[place] for place in range(len(prompts))]


def _greedy(stop: Sequence[int], pad_token_id: int) -> Any:
    """Return a configuration that leaves nothing to a model's own, which may draw or penalize."""
    import transformers

    untyped: Any = transformers
    return untyped.GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=list(stop), pad_token_id=pad_token_id
    )


def _until(ids: Sequence[int], stop: Sequence[int], at_most: int) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
    return list(ids[: min(end, at_most)])
