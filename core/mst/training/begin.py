"""What stands between a loaded model and its first step: layout, sharing, compiling, session."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mst.cache import cache_dir
from mst.configuration import ZERO_STAGES
from mst.data.prepare import has_images
from mst.errors import TrainingError
from mst.rundir import CHECKPOINTS
from mst.training.batches import Layout, layout_of
from mst.training.compilation import compile_layers
from mst.training.deepspeed_config import DEEPSPEED
from mst.training.faults import named
from mst.training.isolation import rows_stay_apart, sharing_obstacle
from mst.training.liger import fuse_layers
from mst.training.report import Reporters
from mst.training.session import logits_in, make_session
from mst.training.tensor_kind import compiled_layout, tensor_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from mst.training.loss import Logits
    from mst.training.session import Session
    from mst.training.task import Training


def session_of(training: Training) -> Session:
    """Return the loop's session, with a reporter that says nothing yet."""
    import torch

    plan, padded = training.plan, _padded(training)
    # ZeRO-3 puts the weights on the device first.
    late = plan.strategy == "zero3" and not padded
    packing = not (late or padded) and _apart(training)
    session = _session(training, packing)
    if late:
        session = replace(session, layout=layout_of(_apart(training), plan.attention))
    if session.layout == "padded" and training.request.packing:
        raise TrainingError(
            "--packing was asked for, but this model does not keep packed rows apart: each would"
            " see those before it. Leave --packing out."
        )
    if session.layout == "padded" and not padded:
        training.console.print(
            "note    this model does not keep rows apart that lie in one line, so each is padded to"
            " the longest; steps take longer and more memory than was forecast"
        )
    # Each rank drops other activations; the adapters were drawn before, alike on all.
    torch.manual_seed(training.request.seed + training.group.rank)
    return session


def _padded(training: Training) -> bool:
    """Return whether each row lies in a line of its own whatever the model can do.

    Positions of images are the model's own: they can't restart within a line. With privacy each
    row's gradient is taken by itself.
    """
    prepared = training.prepared
    return (
        prepared.objective.scores
        or has_images(prepared)
        or training.plan.privacy is not None
        or training.request.padding_free == "off"
    )


def _apart(training: Training) -> bool:
    """Return whether the model keeps rows apart that lie in one line; FlashAttention gets one."""
    lines = 1 if layout_of(True, training.plan.attention) == "line" else 2
    vocabulary = training.prepared.tokenizer.vocab_size
    with named(training.device, "in a first forward pass"):
        return rows_stay_apart(training.model, vocabulary, training.device, lines)


def _session(training: Training, packing: bool) -> Session:
    """Change the model's layers as the plan says, and make the optimizer."""
    prepared, plan = training.prepared, training.plan
    with named(training.device, "in a first forward pass"):
        logits = logits_in(training.model, training.device, plan)
    shares = packing and plan.prefix_sharing and _shares(training, logits)
    layout = _compiled(training, packing, shares, logits) if plan.compiled else None
    if plan.liger:
        _fuse(training, packing, logits)
    zero_config = None
    if ZERO_STAGES[plan.strategy]:
        zero_config = json.loads((training.run / DEEPSPEED).read_text(encoding="utf-8"))
    with named(training.device, "while the optimizer was being made"):
        return make_session(
            training.model,
            training.device,
            plan,
            training.request,
            packing=packing,
            train=prepared.train.examples,
            val=prepared.val.examples if prepared.val else (),
            pad_token_id=prepared.tokenizer.pad_token_id,
            checkpoints=training.run / CHECKPOINTS,
            reporter=Reporters(),
            stop_asked=training.stop,
            group=training.group,
            zero_config=zero_config,
            objective=prepared.objective,
            tokenizer=prepared.tokenizer,
            processor=prepared.template.images,
            keys=training.keys,
            layout=layout,
            shares=shares,
            logits=logits,
        )


def _shares(training: Training, logits: Logits) -> bool:
    """Return whether rows share their beginnings, or say why they don't."""
    import torch

    plan, prepared = training.plan, training.prepared
    with named(training.device, "in a first pass forward and back"):
        reason = sharing_obstacle(
            training.model,
            prepared.tokenizer.vocab_size,
            training.device,
            getattr(torch, plan.compute_dtype),
            plan.max_length + prepared.objective.samples,
            logits,
        )
    if reason:
        training.console.print(
            f"note    what rows begin with alike is computed for each of them ({reason}); steps may"
            " take longer and more memory than was forecast"
        )
    return not reason


def _fuse(training: Training, packing: bool, logits: Logits) -> None:
    """Put Liger's kernels into the model, or say why it is left as it is."""
    scores = training.prepared.objective.scores
    layout = layout_of(packing and not scores, training.plan.attention)
    with (
        training.console.status("compiling Liger's kernels"),
        named(training.device, "while Liger's kernels were compared with the model's layers"),
    ):
        reason = _changed(fuse_layers, training, layout, logits)
    if reason:
        training.console.print(f"note    the layers run without Liger's kernels: {reason}")


def _compiled(training: Training, packing: bool, shares: bool, logits: Logits) -> Layout | None:
    """Compile the model's layers and return what rows lie in, or say why they run as they are."""
    plan, request, prepared = training.plan, training.request, training.prepared
    objective, rows = prepared.objective, prepared.train.examples
    layout: Layout = "padded"
    if packing and not objective.scores:
        held_out = prepared.val.examples if prepared.val else ()
        layout = compiled_layout(plan, request, objective, rows, held_out, shares)
    kind = tensor_kind(plan, request, objective, rows, layout, shares)
    with (
        training.console.status("compiling the model's layers"),
        named(training.device, "while the model's layers were compiled"),
    ):
        reason = _changed(partial(compile_layers, kind=kind), training, layout, logits)
    if reason:
        training.console.print(
            f"note    the layers run uncompiled, and slower than was forecast: {reason}"
        )
    return None if reason else layout


def _changed(change: Callable[..., str], training: Training, layout: Layout, logits: Logits) -> str:
    """Let `fuse_layers` or `compile_layers` change the model; return why it is left as it was."""
    import torch

    return change(
        model=training.model,
        device=training.device,
        dtype=getattr(torch, training.plan.compute_dtype),
        layout=layout,
        how=logits,
        scores=training.prepared.objective.scores,
        cache=cache_dir(),
    )
