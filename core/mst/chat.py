"""Talking to a model: what is loaded, and where, decided before torch is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mst import rundir, serial
from mst.errors import MstError, PlanError
from mst.facts import DeviceFacts, MachineFacts, torch_names
from mst.launch import KILLED, how_it_ended, run_worker, worker_environment
from mst.model.named import named_model
from mst.request import TrainRequest
from mst.runs import RUNS, newest_done
from mst.seal.keys.ring import NO_KEYS, KeyRing, handed_down
from mst.tuned import TunedModel, facts_of, of_model, of_run


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token; larger is more varied.
        top_p: only the most likely tokens that make up this share of the probability.
        seed: of the draws; an answer is the same again with the same seed and device.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ModelJob:
    """A model that a worker loads to answer, and where.

    Attributes:
        name: of what is talked to, for people.
        model: what is loaded.
        backend: whose `mst_activate` is called.
        torch_device: what torch calls the device.
        dtype: of the base weights and the products.
        attention: transformers' attention implementation.
        threads: CPU threads.
        environment: variables set before the worker's interpreter starts.
        dequantized: the base was quantized in training, but this device has no kernels for it.
    """

    name: str
    model: TunedModel
    backend: str
    torch_device: str
    dtype: str
    attention: str
    threads: int
    environment: Mapping[str, str]
    dequantized: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatJob(ModelJob):
    """What the chat's worker does. Its repr shows no text: it may stand in a traceback.

    Attributes:
        context: longest conversation in tokens, if known.
        sampling: how tokens are chosen.
        system: system message at the start of the conversation, if any.
        prompt: asked once; None for a conversation in the terminal.
        language: of what is said around the answers, of `mst.translation.LANGUAGES`.
    """

    context: int | None
    sampling: Sampling
    system: str | None = field(default=None, repr=False)
    prompt: str | None = field(default=None, repr=False)
    language: str = "en"


def choose_model(
    target: str | None,
    which: str | None,
    environ: Mapping[str, str],
    runs: Path = RUNS,
    keys: KeyRing = NO_KEYS,
) -> tuple[str, TunedModel]:
    """Return a name to show and what to load.

    Args:
        target: a run (a path, or a name under `runs`), a model directory or name, a GGUF file;
            None for the newest finished run under `runs`, or else the default model.
        which: a checkpoint of the run, as `mst.tuned.of_run` takes it.
        environ: the process's environment.
        runs: where runs are looked up by name.
        keys: the user's, for an encrypted run.

    Raises:
        MstError: nothing of the kind is here, or it is not whole.
    """
    run = run_of(target, runs)
    if run is not None:
        return f"{rundir.read_manifest(run).model}, tuned in {run}", of_run(run, which, keys)
    named = named_model(TrainRequest(model=target), environ, runs=runs)
    return named.source.name, of_model(named.directory)


def run_of(target: str | None, runs: Path = RUNS) -> Path | None:
    """Return the run that `choose_model` takes for a target; None when it is a model."""
    if target is None:
        return newest_done(runs)
    places = (Path(target).expanduser(), runs / target)
    return next((each for each in places if (each / rundir.MANIFEST).is_file()), None)


def prepare_chat(
    target: str | None,
    device: str,
    sampling: Sampling,
    environ: Mapping[str, str],
    *,
    which: str | None = None,
    system: str | None = None,
    prompt: str | None = None,
    keys: KeyRing = NO_KEYS,
    language: str = "en",
) -> ChatJob:
    """Choose the model and the device, without torch.

    Args:
        target: as `choose_model` takes it.
        device: as `mst.probe.select_device` takes it.
        sampling: how tokens are chosen.
        environ: the process's environment.
        which: a checkpoint of the run.
        system: system message. A run's rows are never read, so a model that was tuned with a
            system message answers as it was tuned only when it is given here again.
        prompt: asked once.
        keys: the user's, for an encrypted run.
        language: of what is said around the answers.

    Raises:
        MstError: no such model, no such device.
    """
    job, context = prepare_model(target, device, environ, which, keys)
    return ChatJob(
        **vars(job), context=context, sampling=sampling, system=system, prompt=prompt,
        language=language,
    )  # fmt: skip


def prepare_model(
    target: str | None,
    device: str,
    environ: Mapping[str, str],
    which: str | None = None,
    keys: KeyRing = NO_KEYS,
    machine: MachineFacts | None = None,
) -> tuple[ModelJob, int | None]:
    """Choose the model and the device, without torch; return them and how much the model reads.

    Args:
        target: as `choose_model` takes it.
        device: as `mst.probe.select_device` takes it.
        environ: the process's environment.
        which: a checkpoint of the run.
        keys: the user's, for an encrypted run.
        machine: as it was found; None to look at it.

    Raises:
        MstError: no such model, no such device.
    """
    from mst.probe import backend_environment, machine_facts, select_device
    from mst.registry import load

    name, model = choose_model(target, which, environ, keys=keys)
    facts = facts_of(model, keys)
    registry = load()
    machine = machine or machine_facts(registry)
    report, chosen, capabilities = select_device(machine, device)
    (torch_device,) = torch_names((chosen,), capabilities)
    job = ModelJob(
        name=name,
        model=model,
        backend=report.name,
        torch_device=torch_device,
        dtype=fastest_dtype(chosen),
        attention=capabilities.attention[0],
        threads=chosen.compute_units or 1,
        environment=backend_environment(registry, report.name, (chosen,)),
        dequantized=model.quantization not in capabilities.quantization,
    )
    return job, facts.max_position_embeddings


def fastest_dtype(device: DeviceFacts) -> str:
    """Return the dtype in which the device runs a model fastest, as the planner chooses too.

    float16 serves here, where training would overflow.

    Raises:
        PlanError: it has none that mst knows.
    """
    for each in device.dtypes:
        if each in ("bfloat16", "float16", "float32"):
            return each
    raise PlanError(
        f"{device.name} offers {', '.join(device.dtypes) or 'no dtype'}; mst runs models in"
        " bfloat16, float16 or float32. Choose another --device (`mst devices` lists them)."
    )


def chat(job: ChatJob, environ: Mapping[str, str], keys: KeyRing = NO_KEYS) -> int:
    """Run the worker in the foreground; return its exit code. Nothing is written to disk.

    Raises:
        MstError: the worker was killed.
    """
    environment = worker_environment(environ, job.environment)
    with handed_down(keys) as held:
        handles = [] if held is None else [held]
        arguments = [serial.dumps(job), *map(str, handles)]
        code = run_worker("mst.chat_worker", arguments, environment, handles)
    if code == KILLED:
        raise MstError(f"{how_it_ended(code, 'Choose a smaller model where memory is short')}.")
    return code
