"""From a job to an engine that answers: the model, its adapters, and how it is best run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst.data.tokens import TextTokenizer, load_tokenizer
from mst.errors import ModelError
from mst.lean_imports import import_lean, without_symbols
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.serve.continuous import ContinuousEngine, Limits
from mst.serve.job import EngineJob
from mst.serve.own_thread import OwnThread
from mst.training.device_memory import trim_heap
from mst.tuned import TunedModel, load, load_dequantized, tuned_keys

if TYPE_CHECKING:
    import torch

    from mst.serve.decoders import Served

# What is kept for later prompts takes no more beside a small model than beside a large one.
_SHARE_OF_WEIGHTS = 4
# What runs and what is kept take so many such shares together; what runs alone may take more.
_SHARES_TOGETHER = 1.25


def load_engine(
    job: EngineJob,
    keys: KeyRing = NO_KEYS,
    say: Callable[[str], None] = lambda line: None,
    tokenizer: TextTokenizer | None = None,
    alone: bool = False,
) -> ContinuousEngine:
    """Load the model and return an engine that runs in a thread of this process.

    Like the chat's worker, the process has hidden the packages that its job doesn't need
    (`mst.extensions.hide_packages`).

    Args:
        job: from `mst.serve.job.prepare_engine`.
        keys: the user's, for encrypted runs.
        say: is called with a line for the user, such as why answers share no passes.
        tokenizer: of the model; None to read it.
        alone: this process does nothing else, so that it is kept small (`mst.lean_imports`).

    Raises:
        ModelError: the model or an adapter can't be loaded, or not in this combination.
        EncryptionError: an encrypted run doesn't open.
    """
    from mst.probe import activate
    from mst.registry import load as load_plugins

    activate(load_plugins(), job.backend)
    lean = alone and job.torch_device == "cpu" and job.model.quantization == "none"
    if lean:
        import_lean()
    import torch

    from mst import library_pages
    from mst.serve.asking import Way, way_of
    from mst.serve.constraint import Constrainer
    from mst.training.faults import named

    device = torch.device(job.torch_device)
    tokenizer = tokenizer or load_tokenizer(Path(job.model.tokenizer))

    def loaded() -> tuple[Served, Way]:
        if device.type == "cpu":
            torch.set_num_threads(job.threads)
        with named(device, "while loading the model"):
            with without_symbols() if lean else nullcontext():
                served = load_served(job, device, keys)
            if alone:
                library_pages.release()
            return served, way_of(served, job.context)

    thread = OwnThread()
    served, way = thread.result(loaded)
    if alone:
        gc.collect()
        trim_heap()
        library_pages.release()
    if way.reason is not None:
        say(f"Each answer of this model takes passes of its own: {way.reason}.")
    return ContinuousEngine(
        served,
        way.decoder,
        job.context,
        limits_of(job, served),
        Constrainer(tokenizer.tokenizer, tokenizer.eos_token_ids, way.vocab_size),
        thread,
    )


def limits_of(job: EngineJob, served: Served) -> Limits:
    """Return what an engine may take; what it keeps follows the model's size, unless a job says."""
    found = Limits(job.batch, job.queue, job.prefill_tokens)
    if job.prefix_bytes is not None:
        return replace(found, prefix_bytes=job.prefix_bytes)
    share = sum(each.nbytes for each in served.model.parameters()) // _SHARE_OF_WEIGHTS
    return replace(
        found,
        prefix_bytes=min(share, found.prefix_bytes),
        together_bytes=int(share * _SHARES_TOGETHER),
    )


def load_served(job: EngineJob, device: torch.device, keys: KeyRing = NO_KEYS) -> Served:
    """Load the model with all adapters beside it.

    Raises: as `load_engine`.
    """
    import torch

    from mst.serve.decoders import Served
    from mst.serve.head_pieces import compute_in_pieces
    from mst.serve.row_adapters import RowAdapters, read_layers, why_not_plain

    own = job.model.adapter
    fault = None if own is None else why_not_plain(own)
    if fault is not None:
        # PEFT knows what else such an adapter does.
        if job.adapters:
            raise ModelError(
                f"the adapter of {job.name} can't be mixed with others in one batch: {fault}."
                " Serve it alone, or merge it (mst merge) and serve what that makes."
            )
        whole = _loaded(job, job.model, device, keys)
        return Served(whole, device, getattr(torch, job.dtype), RowAdapters(whole))
    # What an adapter's run has encrypted is the adapter; the base below it is plain.
    bare = job.model if own is None else replace(job.model, adapter=None, encrypted_run=None)
    base = _loaded(job, bare, device, keys)
    compute_in_pieces(base, device)
    rows = RowAdapters(base)
    dtype = getattr(torch, job.dtype)
    adapters: dict[str | None, TunedModel] = {None: job.model}
    adapters.update(job.adapters)
    for name, each in adapters.items():
        if each.adapter is not None:
            rows.add(name, read_layers(base, each.adapter, dtype, tuned_keys(each, keys)))
    base.eval().requires_grad_(False)
    return Served(base, device, torch.float32, rows)


def _loaded(
    job: EngineJob, model: TunedModel, device: torch.device, keys: KeyRing
) -> torch.nn.Module:
    if job.dequantized:
        return load_dequantized(model, job.attention, device, job.dtype, keys)
    return load(model, job.dtype, job.attention, device, keys)
