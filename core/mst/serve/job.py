"""What `mst serve` loads, and where, decided before torch is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mst.chat import ModelJob, prepare_model, run_of
from mst.errors import ModelError, UsageError
from mst.facts import MachineFacts
from mst.plan import Reason
from mst.probe import machine_facts, select_device
from mst.registry import load
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.tuned import TunedModel, fingerprint_of, of_run

# Of a model whose files don't say how much it reads, such as Mamba.
UNNAMED_CONTEXT = 32_768
# Answers at once. A CPU of few cores gains little from more, and each takes memory of its own.
_MOST_AT_ONCE = 32
_AT_ONCE_A_CORE = 4


@dataclass(frozen=True, kw_only=True)
class EngineJob(ModelJob):
    """What an engine is started with; its model answers prompts that name no adapter.

    Attributes:
        context: most tokens of a prompt and its answer together.
        adapters: others on the same base, by the names that prompts choose them by.
        batch: most answers at once.
        queue: most prompts that wait.
        prefill_tokens: most tokens of prompts computed between two steps of running answers.
        prefix_bytes: most that is kept of finished answers, for prompts that go on from them; None
            for a quarter of what the weights take, and 1 GiB at most.
    """

    context: int
    adapters: Mapping[str, TunedModel] = field(default_factory=dict)
    batch: int = _MOST_AT_ONCE
    queue: int = 256
    prefill_tokens: int = 256
    prefix_bytes: int | None = None


def prepare_engine(
    target: str | None,
    device: str,
    environ: Mapping[str, str],
    *,
    which: str | None = None,
    adapters: Mapping[str, str] | None = None,
    keys: KeyRing = NO_KEYS,
    machine: MachineFacts | None = None,
) -> EngineJob:
    """Choose the model, its adapters and the device, without torch; limits are the defaults.

    Args:
        target: a run, a model directory or name, a GGUF file; None as `mst.chat.choose_model`.
        device: as `mst.probe.select_device` takes it.
        environ: the process's environment.
        which: a checkpoint of the run.
        adapters: runs, or directories of LoRA adapters, by the names that prompts choose them by.
        keys: the user's, for encrypted runs.
        machine: as it was found; None to look at it.

    Raises:
        MstError: no such model or device, or an adapter belongs to another model.
    """
    machine = machine or machine_facts(load())
    job, context = prepare_model(target, device, environ, which, keys, machine)
    others = {
        name: _adapter(name, path, job.model, keys) for name, path in (adapters or {}).items()
    }
    model = _as_trained(job.model, others)
    lacking = _lacks_kernels(model, device, machine)
    job = replace(job, model=model, dequantized=job.dequantized or lacking)
    return EngineJob(
        **vars(job),
        context=context or UNNAMED_CONTEXT,
        adapters=others,
        batch=int(default_batch(job.torch_device, job.threads).value),
    )


def default_batch(torch_device: str, threads: int) -> Reason:
    """Return how many answers are computed at once where nobody has said it, and why."""
    if torch_device != "cpu":
        return Reason("batch", str(_MOST_AT_ONCE), "the default")
    wanted = _AT_ONCE_A_CORE * (threads + 1)
    found = min(_MOST_AT_ONCE, wanted)
    cores = "1 core" if threads == 1 else f"{threads} cores"
    why = f"{_AT_ONCE_A_CORE}, and {_AT_ONCE_A_CORE} for each of {cores}"
    most = "" if found == wanted else f", but {_MOST_AT_ONCE} at most"
    return Reason("batch", str(found), why + most)


def _adapter(name: str, path: str, base: TunedModel, keys: KeyRing) -> TunedModel:
    """Return an adapter on top of a base."""
    run = run_of(path)
    if run is not None:
        tuned = of_run(run, None, keys)
        if tuned.adapter is None:
            raise UsageError(
                f"{path} tuned the whole model, so that it has no adapter to serve as {name!r}."
                " Serve it by itself."
            )
        if fingerprint_of(tuned) != _base_fingerprint(base):
            raise ModelError(
                f"the adapter {name!r} of {path} was trained on {tuned.weights}, and what is served"
                f" is on {base.weights}. Serve it on its own base."
            )
        return tuned
    directory = Path(path).expanduser()
    if not (directory / "adapter_config.json").is_file():
        raise UsageError(
            f"{path} is neither a run nor the directory of a LoRA adapter (with an"
            f" adapter_config.json), so that it can't be served as {name!r}."
        )
    return replace(
        base, adapter=str(directory.absolute()), encrypted_run=None, step=None, template=None
    )


def _base_fingerprint(model: TunedModel) -> str:
    if model.adapter is None and model.encrypted_run is not None:
        raise ModelError("other adapters can't be served on an encrypted run's whole model.")
    return fingerprint_of(model)


def _as_trained(model: TunedModel, adapters: Mapping[str, TunedModel]) -> TunedModel:
    """Return the model with its base quantized as the adapters were trained.

    Raises:
        ModelError: they were not all trained on the same quantized weights.
    """
    kinds = {
        (each.quantization, each.weights_dtype if each.quantization != "none" else "")
        for each in adapters.values()
    }
    own = (model.quantization, model.weights_dtype if model.quantization != "none" else "")
    if model.adapter is not None:
        kinds.add(own)
    if len(kinds) > 1:
        found = ", ".join(sorted(" of ".join(filter(None, each)) for each in kinds))
        raise ModelError(
            f"the adapters were trained on bases in different quantizations ({found}), and one"
            " engine holds one base. Serve them apart, or merge some (mst merge)."
        )
    if model.adapter is not None or not adapters:
        return model
    first = next(iter(adapters.values()))
    return replace(model, quantization=first.quantization, weights_dtype=first.weights_dtype)


def _lacks_kernels(model: TunedModel, device: str, machine: MachineFacts) -> bool:
    """Return whether a device can't compute with a model's quantized weights."""
    if model.quantization == "none":
        return False
    _, _, capabilities = select_device(machine, device)
    return model.quantization not in capabilities.quantization
