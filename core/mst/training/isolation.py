"""Does this model keep packed rows apart? Asked of the model itself, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A packed row's error must be this much smaller than the error when rows do see each other.
_MARGIN = 0.1


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
