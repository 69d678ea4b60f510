"""How a model makes logits of hidden states: asked of the model itself, before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mst.training.adapters import under_adapters

if TYPE_CHECKING:
    import torch

# Both ways are the same products in the same dtype; their logits differ by less than this share of
# the largest.
_SAME = 1e-2


@dataclass(frozen=True)
class HeadForm:
    """What a model does between its output head's product and its logits.

    `logits = softcap * tanh(multiplier * product / softcap)`, without the tanh where there is no
    cap: Gemma 2 has one, Cohere and Granite have factors.

    Attributes:
        multiplier: of the product.
        softcap: bound of the logits, or None.
    """

    multiplier: float = 1.0
    softcap: float | None = None


def decoder_and_head(model: torch.nn.Module) -> tuple[Any, Any]:
    """Return a model's decoder, under adapters too, and the layer that makes its logits."""
    inner = under_adapters(model)
    return inner.base_model, inner.get_output_embeddings()


def head_form(model: torch.nn.Module, device: torch.device) -> HeadForm | None:
    """Return how a model makes its logits; None where that is not known for sure.

    Its logits of a few tokens are compared with what its head makes of its decoder's result.

    Args:
        model: a causal language model of transformers, with or without adapters.
        device: where it is.
    """
    import torch
    from torch.nn import functional

    decoder, head = decoder_and_head(model)
    # Quantized and adapted layers do more than their weight says.
    if type(head) is not torch.nn.Linear:
        return None
    whole: Any = model
    ids = torch.arange(1, 9, device=device)[None] % head.out_features
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = whole(input_ids=ids, use_cache=False).logits.float()
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            product = functional.linear(hidden, head.weight, head.bias).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None  # what is named base_model is no decoder of hidden states
    finally:
        model.train(training)
    if product.shape != logits.shape:
        return None
    form = _fitted(product, logits, _softcap(whole))
    error = (shaped(product, form) - logits).abs().max()
    return form if bool(error <= _SAME * logits.abs().max()) else None


def _softcap(model: Any) -> float | None:
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def _fitted(product: torch.Tensor, logits: torch.Tensor, softcap: float | None) -> HeadForm:
    """Return the form whose factor, by least squares, leads from the product to the logits."""
    if softcap is not None:
        logits = softcap * (logits / softcap).clamp(-0.999, 0.999).atanh()
    factor = float((product * logits).sum() / (product * product).sum())
    return HeadForm(1.0 if abs(factor - 1) < _SAME else factor, softcap)


def shaped(product: torch.Tensor, form: HeadForm) -> torch.Tensor:
    """Return the logits of a head's product."""
    if form.multiplier != 1:
        product = product * form.multiplier
    if form.softcap is not None:
        product = (product / form.softcap).tanh() * form.softcap
    return product
