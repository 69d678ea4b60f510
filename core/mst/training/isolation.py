"""Does this model keep rows apart that lie in one line? Asked of the model, before the first step.

Where it draws or sees something that the question can't show, a rule answers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mst.data.encode import IGNORE, Example
from mst.data.rows import Row
from mst.training.adapters import under_adapters
from mst.training.batches import Batch, collate
from mst.training.faults import free_memory, is_out_of_memory
from mst.training.loss import Logits, compute_in, label_log_probs, logits_of
from mst.training.shared_lines import Line, collate_shared, paths

if TYPE_CHECKING:
    import torch

# A packed row's error must be this much smaller than the error when rows do see each other; in
# float32, where rounding is small, that of rows that share their beginnings smaller yet.
_MARGIN, _MARGIN_IN_FLOAT32 = 0.1, 1e-2
# Where modules of transformers that are no dropout layers hold a rate.
_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob", "hidden_dropout")
# Rows that part after 24 tokens, and two of them after 30.
_FIRST, _SECOND = 24, 30
_ENDS = (11, 13, 7)


def rows_stay_apart(
    model: torch.nn.Module, vocab_size: int, device: torch.device, lines: int = 2
) -> bool:
    """Return whether two rows laid end to end give the logits that each gives alone.

    Args:
        model: a causal language model of transformers.
        vocab_size: ids are below it.
        device: where the model is.
        lines: tensors have so many of these pairs; FlashAttention's kernels keep rows apart in one
            line only.

    position_ids that restart isolate rows in most transformers decoders when there is no
    attention mask, and silently do nothing in others (learned positions without a mask, linear
    attention, old remote code). So a short pair is run both ways, and against a deliberately
    contaminated run that gives the scale: in bfloat16 no absolute tolerance would do.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(0, vocab_size, (1, n), generator=generator).to(device) for n in (11, 13)
    )

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        positions = positions.to(device).expand(len(ids), -1)
        out = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        last: torch.Tensor = out[:, -second.shape[1] :].float()
        return last

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = logits(second, torch.arange(13))
            both = torch.cat([first, second], dim=1).expand(lines, -1)
            packed = logits(both, torch.cat([torch.arange(11), torch.arange(13)]))
            mixed = logits(both, torch.arange(24))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # the forward pass takes no position_ids, or not such ones
    finally:
        model.train(training)
    contamination = (mixed - alone).abs().mean()
    return bool((packed - alone).abs().mean() <= _MARGIN * contamination)


def sharing_obstacle(
    model: torch.nn.Module,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
    how: Logits | None = None,
) -> str:
    """Return why a model's rows can't share their beginnings, or "".

    Args:
        model: a causal language model of transformers, ready to be trained.
        vocab_size: ids are below it.
        device: where the model is.
        dtype: of the matrix products.
        longest: row in tokens.
        how: logits are had; default as the model has them.
    """
    if _drops(model):
        return "dropout would be drawn once for several rows"
    if window := _window(model, longest):
        return f"some of its layers see {window} tokens back, and rows have up to {longest}"
    if _router_counts(model):
        return "its experts are chosen by what else is in a micro-batch"
    try:
        if not prefixes_can_be_shared(model, vocab_size, device, dtype, how):
            return "it does not compute the same under a mask of its own for each row"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The first step says best what is short, and what to lower.
        free_memory(device)
        return "memory ran out while it was tried"
    return ""


def _drops(model: torch.nn.Module) -> bool:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            return True
        for name in _DROPOUTS:
            value = getattr(module, name, None)
            if isinstance(value, float) and value > 0:
                return True
    return False


def _config(model: torch.nn.Module) -> Any:
    whole: Any = under_adapters(model)
    return whole.config.get_text_config()


def _window(model: torch.nn.Module, longest: int) -> int:
    """Return how far back some layers see, where that is less than a row; else 0.

    Under a mask of our own they would see all of a row. GPT-Neo's windows count along the line.
    """
    config = _config(model)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in each or "chunked" in each for each in kinds):
        return 0
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    shorter = [each for each in found if isinstance(each, int) and 0 < each < longest]
    if isinstance(whole := getattr(config, "window_size", None), int):
        shorter.append(whole)
    return min(shorter, default=0)


def _router_counts(model: torch.nn.Module) -> bool:
    config = _config(model)
    names = ("output_router_logits", "router_jitter_noise", "input_jitter_noise", "expert_capacity")
    return any(getattr(config, name, None) for name in names)


def prefixes_can_be_shared(
    model: torch.nn.Module,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    how: Logits | None = None,
) -> bool:
    """Return whether rows that share their beginnings give what each gives alone.

    Log-probabilities and the gradients of the embedded tokens are compared, through the layout
    that training uses; a run in which rows do see each other gives the scale.

    Args: as of `sharing_obstacle`.
    """
    import torch

    rows = _rows(vocab_size)
    line = Line((0, 1, 2), (0, _FIRST, _SECOND))
    batch = collate_shared(rows, [line], 0).to(device)
    width = batch.input_ids.shape[1]
    causal = torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril()
    how = how or logits_of(model)
    training = model.training
    model.eval()
    try:
        with compute_in(model, device.type, dtype):
            alone = [_asked(model, collate([one], 0, "padded").to(device), how) for one in rows]
            shared = _asked(model, batch, how)
            mixed = _asked(model, replace(batch, attention_mask=causal), how)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return False  # the forward pass takes no such mask
    finally:
        model.train(training)
    values = torch.cat([each for each, _ in alone])
    slopes = torch.zeros_like(shared[1])
    for (_, own), path in zip(
        alone, paths(line, [len(one.input_ids) for one in rows]), strict=True
    ):
        places = [place for part in path for place in part]
        slopes[0, places] += own[0, : len(places)]
    margin = _MARGIN_IN_FLOAT32 if dtype == torch.float32 else _MARGIN
    return all(
        float((found - right).abs().mean()) <= margin * float((wrong - right).abs().mean())
        for found, wrong, right in zip(shared, mixed, (values, slopes), strict=True)
    )


def _rows(vocab_size: int) -> Sequence[Example]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> list[int]:
        found: list[int] = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        return found

    first, *ends = drawn(_FIRST), *(drawn(length) for length in _ENDS)
    ids = [first + ends[0], first + ends[1], first + ends[1][: _SECOND - _FIRST] + ends[2]]
    # Few labels, for there are logits of each.
    unlabelled = [IGNORE] * _FIRST
    return [
        Example(array("i", each), array("i", unlabelled + each[_FIRST:]), Row((), "", 0))
        for each in ids
    ]


def _asked(model: torch.nn.Module, batch: Batch, how: Logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of labels, and their gradient with respect to the embeddings.

    Later labels count for more, lest one be taken for another.
    """
    import torch

    held: list[torch.Tensor] = []

    def detached(_: torch.nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        held.append(out.detach().requires_grad_())
        return held[-1]

    inner: Any = under_adapters(model)
    hook = inner.get_input_embeddings().register_forward_hook(detached)
    try:
        values = label_log_probs(model, batch, how)
        factors = 1 + batch.targets.flatten()[batch.labelled] % 3
        if batch.labels is not None:
            factors = 1 + batch.labels % 3
        (slopes,) = torch.autograd.grad((values * factors).sum(), held[:1])
    finally:
        hook.remove()
    return values.detach(), slopes.float()
