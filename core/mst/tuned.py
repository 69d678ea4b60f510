"""What a run made, as something to load: base weights, adapter, tokenizer and template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mst import rundir
from mst.cache import cache_dir
from mst.errors import RunError, UsageError
from mst.model.facts import ModelFacts, read_facts
from mst.model.fingerprint import model_sha256
from mst.plan import Plan
from mst.request import TrainRequest
from mst.rundir import RunManifest
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.seal.keys.run_key import run_keys
from mst.seal.supply.before_use import verify_before_use
from mst.training import checkpoint
from mst.training.tensor_files import ADAPTER_WEIGHTS, file_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TunedModel:
    """A model as it is put together from directories; all paths are absolute.

    Attributes:
        weights: directory of the base model, or of the whole tuned model.
        adapter: directory of the LoRA adapter; None for a whole model.
        tokenizer: directory that holds tokenizer.json.
        template: jinja file that overrides the tokenizer's own template; None for none.
        step: optimizer steps it was trained for; None when it comes from no run.
        quantization: of the base's linear layers while the adapter was trained: "none", "nf4" or
            "int8".
        weights_dtype: torch name of the dtype that the base was quantized from; other weights
            were held in it. Another one would give other quantized weights.
        encrypted_run: run directory whose key opens the adapter or the whole model; None when they
            are plain.
    """

    weights: str
    adapter: str | None
    tokenizer: str
    template: str | None = None
    step: int | None = None
    quantization: str = "none"
    weights_dtype: str = "bfloat16"
    encrypted_run: str | None = None


def of_model(directory: Path) -> TunedModel:
    """Return an ordinary model directory, tuned by nobody we know of."""
    path = str(directory.absolute())
    return TunedModel(weights=path, adapter=None, tokenizer=path)


def of_run(run: Path, which: str | None = None, keys: KeyRing = NO_KEYS) -> TunedModel:
    """Return what a run made.

    Args:
        run: the run directory.
        which: checkpoint to take: "last", "best" or a step; None for the finished result.
        keys: the user's, for an encrypted run.

    Raises:
        EncryptionError: it is encrypted, and none of them opens it.
        RunError: it isn't done, the checkpoint isn't there or not whole, the base model is gone or
            has changed, or the run made a reward model.
        UsageError: `which` is none of these.
    """
    manifest = rundir.read_manifest(run)
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    plan = rundir.read_document(Plan, run, rundir.PLAN)
    if request.task == "rm":
        made = "model" if plan.tuner == "full" else "adapter"
        raise RunError(
            f"{run} made a reward model: it scores conversations and writes none, so it can't be"
            f" talked to, and mst has no check for a merge of its scores. {run / made} loads with"
            " transformers and PEFT: docs/objectives.md shows how."
        )
    own = run_keys(run, keys) if request.encrypt_run else NO_KEYS
    source, step = _result(run, plan, own) if which is None else _checkpoint(run, which, own)
    has_adapter = plan.tuner != "full"
    weights = file_name(ADAPTER_WEIGHTS, own)
    if has_adapter and not (source / weights).is_file():
        raise RunError(f"{source} holds no {weights}. Restore it from a backup, or train again.")
    # A whole model's directory has its own tokenizer, its checkpoints have not.
    stands_alone = plan.tuner == "full" and (source / "tokenizer.json").is_file()
    base = source.absolute() if stands_alone else base_model(run, manifest, request)
    template = request.template
    if template is not None and not Path(template).expanduser().is_file():
        raise RunError(
            f"{run} was trained with the template {template}, which is gone. Put the file back:"
            " another template would give the model other prompts than it has learnt."
        )
    return TunedModel(
        weights=str(base if has_adapter else source.absolute()),
        adapter=str(source.absolute()) if has_adapter else None,
        tokenizer=str(base),
        template=None if template is None else str(Path(template).expanduser().absolute()),
        step=step,
        quantization=plan.quantization,
        weights_dtype=plan.weights_dtype,
        encrypted_run=str(run.absolute()) if request.encrypt_run else None,
    )


def tuned_keys(tuned: TunedModel, keys: KeyRing) -> KeyRing:
    """Return the keys of the encrypted run that a model is of; none for a plain one.

    Raises:
        EncryptionError: the user's keys don't open it.
    """
    return NO_KEYS if tuned.encrypted_run is None else run_keys(Path(tuned.encrypted_run), keys)


def facts_of(tuned: TunedModel, keys: KeyRing) -> ModelFacts:
    """Return the facts of the base model, or of the whole tuned model.

    Raises:
        ModelError: as `mst.model.facts.read_facts`.
        EncryptionError: it is of an encrypted run, and the user's keys don't open it.
    """
    return read_facts(Path(tuned.weights), keys=_keys_of_weights(tuned, keys))


def fingerprint_of(tuned: TunedModel) -> str:
    """Return the fingerprint of the base model, or of the whole tuned model; it needs no key."""
    encrypted = tuned.adapter is None and tuned.encrypted_run is not None
    return model_sha256(Path(tuned.weights), encrypted)


def _keys_of_weights(tuned: TunedModel, keys: KeyRing) -> KeyRing:
    """Return the keys of `TunedModel.weights`: under an adapter lies a plain base."""
    return tuned_keys(tuned, keys) if tuned.adapter is None else NO_KEYS


def base_model(run: Path, manifest: RunManifest, request: TrainRequest) -> Path:
    """Return the directory of the model that a run was tuned from; a converted copy that was
    cleaned away is made again from its GGUF file.

    Raises:
        RunError: it is gone, or another model lies there.
        MstError: the run was trained from a signed model, and what lies there is not it.
    """
    base, source = Path(manifest.model_path), Path(request.model or "")
    if not base.is_dir() and source.suffix.lower() == ".gguf" and source.is_file():
        from mst.model.gguf import convert

        base = convert(source, cache_dir())
    if not base.is_dir():
        raise RunError(
            f"the base model of {run} is gone: {base} is no directory."
            " Put it back there; an adapter is of no use without the model it was trained on."
        )
    verify_before_use(base, request.model_signature, request.model_public_key)
    read_facts(base)
    if model_sha256(base) != manifest.model_sha256:
        raise RunError(
            f"{base} holds another model than {run} was trained on (its config or its weights"
            " differ from run.json's model_sha256). Put the original back."
        )
    return base.absolute()


def _result(run: Path, plan: Plan, keys: KeyRing) -> tuple[Path, int]:
    state = rundir.state_of(run)
    if state == "running":
        raise RunError(
            f"{run} is running, so it has no result yet. Wait until it has ended, or pass"
            " --checkpoint last."
        )
    if state != "done":
        raise RunError(
            f"{run} is {state}, so it has no result yet. Go on with it"
            f" (mst train --output-dir {run} --resume), or pass --checkpoint last."
        )
    source = run / ("model" if plan.tuner == "full" else "adapter")
    if not checkpoint.is_whole(source, keys):
        raise RunError(
            f"{source} is damaged: a file is missing or differs from its manifest. Restore it from"
            " a backup, or pass --checkpoint last."
        )
    return source, int(rundir.read_manifest(run).results.get("steps", 0))


def _checkpoint(run: Path, which: str, keys: KeyRing) -> tuple[Path, int]:
    directory = run / rundir.CHECKPOINTS
    newest = checkpoint.newest_whole(directory, keys)
    if newest is None:
        raise RunError(f"{run} has no whole checkpoint. Train it: --save-steps says how often.")
    if which == "last":
        return newest, checkpoint.read_state(newest).step
    if which == "best":
        step = checkpoint.read_state(newest).best_step
        if step is None:
            raise RunError(
                f"{run} was not evaluated yet, so no checkpoint is the best."
                " Pass --checkpoint last."
            )
    elif re.fullmatch("[0-9]{1,8}", which):
        step = int(which)
    else:
        raise UsageError(f"--checkpoint takes last, best or a step, not {which!r}.")
    path = checkpoint.checkpoint_path(directory, step)
    if not checkpoint.is_whole(path, keys):
        here = [int(each.name[len("step-") :]) for each in checkpoint.listed(directory)]
        raise RunError(
            f"{run} has no whole checkpoint of step {step} (found: {', '.join(map(str, here))})."
            " Pass one of these to --checkpoint, or last."
        )
    return path, step


def load(
    tuned: TunedModel,
    dtype: str,
    attention: str,
    device: torch.device,
    keys: KeyRing = NO_KEYS,
) -> torch.nn.Module:
    """Load the model in evaluation mode, the adapter on top of its base, quantized as trained.

    Args:
        tuned: which files.
        dtype: torch dtype name of the products and of the base weights, which a quantized base
            has in the dtype of its training; an adapter's are float32.
        attention: transformers' attention implementation.
        device: where it goes.
        keys: the user's, for an encrypted run.

    Raises:
        ModelError: the files can't be loaded, or the base was quantized and bitsandbytes is not
            here.
        EncryptionError: they are encrypted, and the keys don't open them.
    """
    from mst.training.adapters import load_model

    quantized = tuned.quantization != "none"
    held = tuned.weights_dtype if quantized else dtype
    model = load_model(
        Path(tuned.weights),
        held,
        attention,
        device,
        tuned.quantization,
        dtype,
        keys=_keys_of_weights(tuned, keys),
    )
    return _with_adapter(model, tuned, keys)


def load_dequantized(
    tuned: TunedModel,
    attention: str,
    device: torch.device,
    dtype: str = "float32",
    keys: KeyRing = NO_KEYS,
) -> torch.nn.Module:
    """Load the model in evaluation mode, in ordinary layers with the quantized weights' values.

    Args:
        tuned: which files; one that was not quantized is loaded as it is.
        attention: transformers' attention implementation.
        device: where it goes; the weights are quantized and restored on the CPU.
        dtype: torch dtype name of the base weights; float32 keeps the values exactly.
        keys: the user's, for an encrypted run.

    Raises:
        ModelError: as `load`.
        EncryptionError: as `load`.
    """
    import torch

    from mst.training.adapters import load_model
    from mst.training.quantization import dequantize

    if tuned.quantization == "none":
        return load(tuned, dtype, attention, device, keys)
    host = torch.device("cpu")
    directory = Path(tuned.weights)
    model = load_model(directory, tuned.weights_dtype, attention, host, tuned.quantization)
    model = dequantize(model)
    # Not `model.to(dtype)`: it would round buffers too, such as the rotary frequencies.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return _with_adapter(model.to(device), tuned, keys)


def _with_adapter(model: torch.nn.Module, tuned: TunedModel, keys: KeyRing) -> torch.nn.Module:
    if tuned.adapter is not None:
        from mst.training.adapters import with_adapter

        model = with_adapter(model, tuned.adapter, tuned_keys(tuned, keys))
    model.eval()
    return model
