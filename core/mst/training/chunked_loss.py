"""Log-probabilities of labels from hidden states, chunk by chunk: never the logits of all."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from mst.training.batches import KEPT_MULTIPLE, chunk_rows, rounded
from mst.training.output_head import HeadForm, shaped

# So many logits in float32 are a MiB, what a server core's own cache holds.
_CACHED_LOGITS = 2**18


def chunked_log_probs(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    targets: torch.Tensor,
    form: HeadForm,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return the log-probability of each target, (labels,), as float32.

    Nothing of the vocabulary's size is kept. A label's log-probability depends on its own hidden
    state alone, so the forward pass keeps the gradient with respect to that, a row a label; where
    the head is trained too, the backward pass computes each chunk once more.

    Args:
        hidden: (labels, width) states that the targets are predicted from.
        head: width to vocabulary.
        targets: (labels,) token ids.
        form: of the logits.
        temperature: that they are divided by.

    Source: Hsu et al. 2024, "Liger Kernel", section 3.2, computes head and loss in chunks.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    # A CPU's kernels keep scratch space for every shape they meet: see `KEPT_MULTIPLE`.
    extra = rounded(len(targets), KEPT_MULTIPLE) - len(targets)
    found: torch.Tensor = _LabelLogProbs.apply(  # type: ignore[no-untyped-call]
        functional.pad(hidden.to(dtype), (0, 0, 0, extra)),
        head.weight.to(dtype),
        None if head.bias is None else head.bias.to(dtype),
        functional.pad(targets, (0, extra)),
        form,
        temperature,
    )
    return found[: len(targets)]


def _log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    form: HeadForm,
    temperature: float,
) -> torch.Tensor:
    if hidden.dtype == torch.float32:
        product = functional.linear(hidden, weight, bias)
    else:
        product = _about_targets(hidden, weight, targets)
        product = product if bias is None else product + bias.float()
    logits = shaped(product, form)
    if temperature != 1:
        logits = logits / temperature
    return -functional.cross_entropy(logits, targets, reduction="none")


def _about_targets(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the head's product (labels, vocabulary) in float32, most exact near each target's.

    A product of 16-bit numbers is summed up in float32 and rounded at its end: logits of 20 by up
    to 0.06. So each label's own logit, as a 16-bit number, is taken off before that and added again
    afterwards: what is about as likely as the label is hardly rounded, and much only what hardly
    counts.
    """
    own = _own_logits(hidden, weight, targets)
    return torch.addmm(-own, hidden, weight.mT).float() + own.float()


@torch.no_grad()
def _own_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the product of each target's row of the head with its state, (labels, 1)."""
    return (hidden.float() * weight[targets].float()).sum(-1, keepdim=True).to(hidden.dtype)


def _by_rows(hidden: torch.Tensor, form: HeadForm) -> bool:
    """Return whether `_with_slopes` computes what these ask for."""
    return hidden.device.type == "cpu" and form.softcap is None


def _with_slopes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    form: HeadForm,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target and its gradient with respect to `hidden`.

    `_log_probs` and its gradient, a few rows at a time in float32, so that these stay in a core's
    cache. The gradient of a row of logits, 1 at the target and 0 elsewhere less the softmax, takes
    the place of the product.
    """
    exact = hidden.dtype == torch.float32
    own = hidden.new_zeros(len(hidden), 1) if exact else _own_logits(hidden, weight, targets)
    products = hidden @ weight.mT if exact else torch.addmm(-own, hidden, weight.mT)
    factor = form.multiplier / temperature
    found = hidden.new_empty(len(hidden), dtype=torch.float32)
    size = max(1, _CACHED_LOGITS // len(weight))
    for start in range(0, len(products), size):
        part = slice(start, start + size)
        logits = products[part].float() + own[part].float()
        if bias is not None:
            logits += bias.float()
        values = torch.log_softmax(logits if factor == 1 else logits.mul_(factor), -1)
        at = targets[part, None]
        found[part] = values.gather(1, at)[:, 0]
        slopes = values.exp_().neg_()
        slopes.scatter_add_(1, at, slopes.new_ones(at.shape))
        products[part] = slopes if factor == 1 else slopes.mul_(factor)
    return found, products @ weight


class _LabelLogProbs(torch.autograd.Function):
    """`chunked_log_probs` of states and weights in the products' dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        form: HeadForm,
        temperature: float,
    ) -> torch.Tensor:
        ctx.form, ctx.temperature = form, temperature
        ctx.head_is_trained = any(ctx.needs_input_grad[1:3])
        slopes = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] else None
        if ctx.head_is_trained:
            slopes = None
            ctx.save_for_backward(hidden, weight, bias, targets)
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(hidden, weight):
                if slopes is not None and _by_rows(hidden, form):
                    states = hidden[part]
                    found[part], slopes[part] = _with_slopes(
                        states, weight, bias, targets[part], form, temperature
                    )
                    continue
                with torch.set_grad_enabled(slopes is not None):
                    states = hidden[part].detach().requires_grad_(slopes is not None)
                    values = _log_probs(
                        states, weight.detach(), bias, targets[part], form, temperature
                    )
                found[part] = values.detach()
                if slopes is not None:
                    (slopes[part],) = torch.autograd.grad(values, states, torch.ones_like(values))
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.head_is_trained:
            (slopes,) = ctx.saved_tensors
            return (slopes * gradient[:, None]).to(slopes.dtype), *[None] * 5
        hidden, weight, bias, targets = ctx.saved_tensors
        weight = weight.detach().requires_grad_()
        head = [weight]
        if bias is not None:
            bias = bias.detach().requires_grad_()
            head.append(bias)
        of_hidden = torch.empty_like(hidden)
        # In float32, as one product over all labels would sum up.
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in head]
        for part in _parts(hidden, weight):
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                states = hidden[part].detach().requires_grad_()
                values = _log_probs(states, weight, bias, targets[part], ctx.form, ctx.temperature)
            of_hidden[part], *found = torch.autograd.grad(values, [states, *head], gradient[part])
            for each, value in zip(sums, found, strict=True):
                each += value
        of_weight, *of_bias = (each.to(hidden.dtype) for each in sums)
        return of_hidden, of_weight, of_bias[0] if of_bias else None, None, None, None


def _parts(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = chunk_rows(len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
