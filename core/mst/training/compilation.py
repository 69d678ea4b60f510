"""Decoder layers compiled once, for all layers and every size of micro-batch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.errors import MstError
from mst.training.batches import TOKENS_MULTIPLE, Layout, rounded
from mst.training.faults import is_out_of_memory
from mst.training.layer_gradients import difference, in_a_line, last_gradients, made_up_row
from mst.training.loss import Logits
from mst.training.output_head import decoder_and_head
from mst.training.scoring import Laid, lay_out
from mst.training.tensor_kind import TensorKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

# What compiled code depends on beside what torch's own caches look at: these see an operator's name
# alone, and code that was compiled for an operator's old strides refuses tensors in new ones.
_VERSIONED = ("torch", "transformers", "peft")
_OPERATORS = tuple(
    Path(__file__).with_name(f"{name}.py") for name in ("block_attention", "quantized_products")
)
# Sizes of the tensors that layers are compiled for. No two are alike, lest torch take them for one.
_LINES, _WIDTH = 3, 80


def kernel_cache(root: Path) -> Path:
    """Return the directory that compiled kernels are kept in, made for this user alone.

    torch loads native code and pickles from it, so nobody else may have written there.

    Args:
        root: of mst's caches.

    Raises:
        MstError: somebody else may write there.
    """
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in _VERSIONED)
    key = hashlib.sha256(b"".join([versions.encode(), *(each.read_bytes() for each in _OPERATORS)]))
    place = root / "compiled" / key.hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    for each in (place, place.parent):
        found = each.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise MstError(
                f"{each} holds native code that would be run, and others than you may write to it."
                f" Remove it (rm -r {each}), or pass --torch-compile off."
            )
    return place


def compiler_environment(root: Path) -> dict[str, str]:
    """Return variables for torch's compiler; it reads them when it is imported."""
    # Its own pool of compiling processes would hold 300 MiB each for as long as the run lasts.
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(kernel_cache(root)),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def compile_layers(
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout,
    kind: TensorKind,
    how: Logits,
    scores: bool,
    cache: Path,
) -> str:
    """Compile the decoder's layers, or leave them as they are and return why.

    A pass forward and back over a few tokens compiles them, so that nothing can fail later, and
    its gradients are compared with those of the plain layers: torch 2.13.0 compiles wrong ones for
    Falcon on several threads, which write into the one key that its heads share.

    Args:
        model: ready to be trained.
        device: where it is.
        dtype: of the matrix products.
        layout: of the micro-batches.
        kind: of their tensors.
        how: logits are had.
        scores: the model gives scores instead.
        cache: root of mst's caches.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder, _ = decoder_and_head(model)
    layers = [each for each in decoder.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        return "transformers does not say which of this model's modules are its layers"
    try:
        os.environ.update(compiler_environment(cache))
    except (OSError, MstError) as error:
        return str(error)
    plain = [type(each) for each in layers]
    whole: Any = model
    vocabulary = whole.get_input_embeddings().num_embeddings
    laid = _made_up(layout, kind, vocabulary).to(device)

    def gradients() -> list[torch.Tensor]:
        with _torch_settings():
            return last_gradients(model, laid, device, dtype, how, scores)

    with kinds_given(layers) as given:
        right = gradients()
    compiled = {each: _compiled(each, given.get(each, kind)) for each in dict.fromkeys(plain)}
    for layer in layers:
        layer.__class__ = compiled[type(layer)]
    reason = ""
    try:
        reason = difference(right, gradients(), dtype)
        if not all(each.ran for each in compiled.values()):
            reason = "they are given other tensors than most models' layers"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = _reason(error)
    if reason:
        for layer, before in zip(layers, plain, strict=True):
            layer.__class__ = before
        model.zero_grad(set_to_none=True)
    return reason


def _compiled(layer_type: type[Any], kind: TensorKind) -> type[Any]:
    """Return a subclass whose forward pass is compiled where it is given `kind` and gradients.

    A subclass, and not a new method of each layer: a copied model's layers compute with the copy's
    weights. transformers checkpoints around it, as it does around any layer of its own.
    """
    import torch

    plain = layer_type.forward
    # Every size is a variable of the one compilation; a graph that would break is an error.
    fast = torch.compile(plain, dynamic=True, fullgraph=True)

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and _kind((hidden_states, *args), kwargs) == kind):
            return plain(self, hidden_states, *args, **kwargs)
        if not hidden_states.requires_grad:
            # The first layer's input: with a gradient that nobody reads it is as the others'.
            hidden_states = hidden_states.detach().requires_grad_()
        type(self).ran = True
        return fast(self, hidden_states, *args, **kwargs)  # type: ignore[no-untyped-call]

    names = {"__module__": layer_type.__module__, "__qualname__": layer_type.__qualname__}
    return type(layer_type.__name__, (layer_type,), {"forward": forward, "ran": False, **names})


@contextlib.contextmanager
def kinds_given(layers: Sequence[torch.nn.Module]) -> Iterator[dict[type[Any], TensorKind]]:
    """Note what each type of layer is given: some have a mask where others have none."""
    found: dict[type[Any], TensorKind] = {}

    def note(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        kind = _kind(args, kwargs)
        if kind is not None:
            found.setdefault(type(layer), kind)

    handles = [each.register_forward_pre_hook(note, with_kwargs=True) for each in layers]
    try:
        yield found
    finally:
        for each in handles:
            each.remove()


def _kind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TensorKind | None:
    """Return the kind of a layer's arguments; None where they are of neither."""
    hidden = args[0] if args else kwargs["hidden_states"]
    masks = [each for each in _tensors(args, kwargs) if each.dim() == 4]
    if hidden.dim() != 3 or any(each.shape[0] != hidden.shape[0] for each in masks):
        return None
    return TensorKind(hidden.shape[0] > 1, bool(masks))


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    import torch

    yield from (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))


def _torch_settings() -> contextlib.ExitStack:
    """Return a context in which passes are compiled, backward ones at once with the forward ones.

    Dropout is drawn as it is uncompiled.
    """
    passes = importlib.import_module("torch._functorch.config")
    kernels = importlib.import_module("torch._inductor.config")
    stack = contextlib.ExitStack()
    stack.enter_context(passes.patch(force_non_lazy_backward_lowering=True))
    stack.enter_context(kernels.patch(fallback_random=True))
    # The compiler calls parts of torch that torch itself has deprecated.
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return stack


def _made_up(layout: Layout, kind: TensorKind, vocabulary: int) -> Laid:
    """Return a micro-batch of made-up tokens, laid out as rows are."""
    lengths = [_WIDTH // 2, _WIDTH // 2] if kind.masked and layout != "padded" else [_WIDTH]
    if not kind.masked and layout == "alike":
        lengths = [rounded(_WIDTH, TOKENS_MULTIPLE)]  # or the line would be padded, and have a mask
    lines = [lengths] * (_LINES if kind.several else 1)
    if kind.masked and layout == "padded":
        lines[0] = [_WIDTH // 2]
    lengths = [length for line in lines for length in line]
    rows = [made_up_row(number, length, vocabulary) for number, length in enumerate(lengths)]
    numbers = iter(range(len(rows)))
    return lay_out(rows, 0, layout, [[next(numbers) for _ in line] for line in lines])


def _reason(error: Exception) -> str:
    """Return a compiler's error in a line."""
    import torch._inductor.exc

    if isinstance(error.__cause__ or error, torch._inductor.exc.InvalidCxxCompiler):
        return "no C++ compiler is here"
    return in_a_line(error)
