"""Whether layers that compute in another way learn the same: gradients of the last, compared."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from mst.data.encode import Example
from mst.data.rows import Row
from mst.training.adapters import decoder_layers
from mst.training.loss import Logits, compute_in
from mst.training.scoring import Laid, scored

if TYPE_CHECKING:
    import torch

# Of a gradient's norm, what rounding makes of it: measured 1e-6 in float32, and up to 0.03 in
# bfloat16, in the last layer of SmolLM2-135M.
_DIFFERENCE, _DIFFERENCE_IN_HALF = 1e-4, 0.15


def last_gradients(
    model: torch.nn.Module,
    laid: Laid,
    device: torch.device,
    dtype: torch.dtype,
    how: Logits,
    scores: bool,
) -> list[torch.Tensor]:
    """Return the gradients of the last layer, which no other layer's rounding has reached.

    Args:
        model: ready to be trained; keeps no gradient.
        laid: a micro-batch, on the device.
        device: where the model is.
        dtype: of the matrix products.
        how: logits are had.
        scores: the model gives scores instead.
    """
    import torch

    torch.manual_seed(0)  # the same dropout
    model.zero_grad(set_to_none=True)
    with compute_in(model, device.type, dtype):
        found = scored(model, laid, how, scores)
        told: Any = found.log_probs if found.scores is None else found.scores
        told.sum().backward()
    last = decoder_layers(model)[-1]
    trained = [each.grad for each in last.parameters() if each.grad is not None]
    model.zero_grad(set_to_none=True)
    return trained


def made_up_row(number: int, length: int, vocabulary: int) -> Example:
    """Return a row of made-up tokens, other ones for each number."""
    ids = array("i", [(3 + 2 * number) * place % min(vocabulary, 251) for place in range(length)])
    return Example(ids, ids, Row((), "", 0))


def in_a_line(error: Exception) -> str:
    """Return an error of a library in a line; its first may say no more than whose the next is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"


def difference(right: list[torch.Tensor], found: list[torch.Tensor], dtype: torch.dtype) -> str:
    """Return by how much gradients are wrong, "" where it is rounding.

    Args:
        right: of the plain layers.
        found: of the others.
        dtype: of the matrix products.
    """
    import torch

    allowed = _DIFFERENCE
    if dtype != torch.float32:
        # Rounding is large beside a small gradient, so all are taken together.
        right, found = ([torch.cat([one.flatten() for one in each])] for each in (right, found))
        allowed = _DIFFERENCE_IN_HALF
    pairs = zip(right, found, strict=True)
    worst = max(float((b - a).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)
    if worst <= allowed:
        return ""
    return f"its gradients differ by {worst:.2%}, where {allowed:.2%} would be rounding"
