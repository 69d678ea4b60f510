"""The gradient of each row by itself, by Opacus's hooks, and a proof that it is that row's."""

from __future__ import annotations

import contextlib
import warnings
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mst.data.encode import IGNORE, Example
from mst.data.rows import Row
from mst.errors import TrainingError
from mst.training.adapters import trained_parameters
from mst.training.micro_batches import row_losses

if TYPE_CHECKING:
    import torch

    from mst.training.session import Session

# In bfloat16 a row's gradient differs a little when the row stands beside others (SmolLM2: 4 % of
# its size in the middle, 24 % at the most); another row's, or a mixture's, by its whole size.
TOLERANCE = 0.5
_LENGTHS = (23, 9)


class RowGradients:
    """Hooks on the adapters of a model; a backward pass leaves a gradient a row."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Hook into `model`, whose trained weights are those of linear layers."""
        from opacus.grad_sample import GradSampleHooks

        self._model = model
        self.weights = [each for _, each in trained_parameters(model)]
        # Not strict: a frozen layer may hold buffers, such as the rotary frequencies.
        self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a sum over rows."""
        with warnings.catch_warnings():
            # Nothing before the first adapter needs a gradient; the hook does not need it either.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            loss.backward()  # type: ignore[no-untyped-call]

    def taken(self) -> list[torch.Tensor | None]:
        """Return, and forget, the rows' gradients of each weight, (rows, *shape).

        None where no row reached a weight.
        """
        held: list[Any] = self.weights
        found = [each.grad_sample for each in held]
        self.forget()
        return found

    def forget(self) -> None:
        """Drop what passes have left, whole or broken off."""
        held: list[Any] = self.weights
        for each in held:
            each.grad = each.grad_sample = None
            each._forward_counter = 0
            if hasattr(each, "_current_grad_sample"):
                del each._current_grad_sample
        for module in self._model.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Let passes be as if there were no hooks."""
        self._hooks.disable_hooks()
        try:
            yield
        finally:
            self._hooks.enable_hooks()


def check_row_gradients(session: Session, rows: RowGradients) -> None:
    """Make sure that each row's gradient is what the row gives alone, on the model itself.

    A model that lets rows meet, such as one with experts that gather tokens of all rows, would
    leave gradients of mixtures, which no clipping makes private. Two rows of random tokens, of
    unlike lengths, are compared; the adapters hold random values meanwhile.

    Raises:
        TrainingError: they differ.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    size = int(session.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    examples = [_random_row(size, length, generator) for length in _LENGTHS]
    with _random_adapters(rows.weights, generator), _without_dropout(session.model):
        rows.backward(row_losses(session, examples).sum())
        together = rows.taken()
        for place, example in enumerate(examples):
            with rows.off():
                rows.backward(row_losses(session, [example]).sum())
            for each, mixed in zip(rows.weights, together, strict=True):
                _compare(each.grad, mixed, place, len(examples))
            rows.forget()


def _compare(
    alone: torch.Tensor | None, mixed: torch.Tensor | None, place: int, count: int
) -> None:
    if alone is None and mixed is None:
        return
    if alone is not None and mixed is not None and mixed.shape == (count, *alone.shape):
        difference = (mixed[place].float() - alone.float()).norm()
        if difference <= TOLERANCE * alone.float().norm() + 1e-12:
            return
    raise TrainingError(
        "--dp-epsilon was asked for, but in this model a row's gradient can't be told from those of"
        " the rows beside it (experts that gather the tokens of all rows do that), so the bound"
        " would not hold. Choose another model, or --target-modules that only its attention has."
    )


def _random_row(vocabulary: int, length: int, generator: torch.Generator) -> Example:
    import torch

    ids = array("i", torch.randint(vocabulary, (length,), generator=generator).tolist())
    labels = array("i", [IGNORE, *ids[1:]])
    return Example(ids, labels, Row((), "", 0))


@contextlib.contextmanager
def _random_adapters(
    weights: Sequence[torch.nn.Parameter], generator: torch.Generator
) -> Iterator[None]:
    """Hold random values: half of the adapters begin at 0, where the others have no gradient."""
    import torch

    before = [each.detach().clone() for each in weights]
    try:
        for each in weights:
            each.data.copy_(torch.randn(each.shape, generator=generator) * 0.02)
        yield
    finally:
        for each, value in zip(weights, before, strict=True):
            each.data.copy_(value)


@contextlib.contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    import torch

    layers = [each for each in model.modules() if isinstance(each, torch.nn.Dropout)]
    before = [each.training for each in layers]
    try:
        for each in layers:
            each.eval()
        yield
    finally:
        for each, training in zip(layers, before, strict=True):
            each.train(training)
