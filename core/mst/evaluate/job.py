"""An evaluation as it is decided before torch is loaded: models, rows, device, metrics."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mst import rundir, serial
from mst.chat import choose_model, fastest_dtype, run_of
from mst.data.prepare import DEFAULT_MAX_LENGTH
from mst.errors import EXIT_INTERRUPTED, EvaluationError, Interrupted, MstError, UsageError
from mst.evaluate.batching import token_budget
from mst.evaluate.choice import check_names
from mst.evaluate.report import EvalReport
from mst.facts import Capabilities, DeviceFacts, torch_names
from mst.launch import how_it_ended, run_worker, worker_environment
from mst.plan import Plan
from mst.quantities import FLOAT_BYTES
from mst.request import TrainRequest
from mst.seal.keys.ring import NO_KEYS, KeyRing, handed_down
from mst.tuned import TunedModel, base_model, facts_of, fingerprint_of

BASE = "base"


@dataclass(frozen=True)
class EvalRequest:
    """What was asked.

    Attributes:
        target: as `mst.chat.choose_model` takes it.
        checkpoint: of the run; None for its result.
        dataset: files; empty for the run's own held-out rows.
        metrics: names, or "auto".
        metric_file: FILE.py or FILE.py:FUNCTION of a metric of the user's own.
        compare: "base", or another target.
        max_new_tokens: longest answer.
        max_length: longest row in tokens; None for the run's, or the model's context.
        limit: most rows; None for all.
        batch_rows: most rows in one pass.
        device: as `mst.probe.select_device` takes it.
        seed: of the bootstrap.
        predictions: file for rows and answers; None for none.
        harness: tasks of lm-evaluation-harness, instead of rows and metrics.
        tasks_dir: where their YAML files are.
        harness_python: of the environment that it is installed in; None for this one.
        apply_chat_template: the harness asks as in a chat.
    """

    target: str | None = None
    checkpoint: str | None = None
    dataset: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("auto",)
    metric_file: str | None = None
    compare: str | None = None
    max_new_tokens: int = 256
    max_length: int | None = None
    limit: int | None = None
    batch_rows: int = 16
    device: str = "auto"
    seed: int = 0
    predictions: str | None = None
    harness: tuple[str, ...] = ()
    tasks_dir: str | None = None
    harness_python: str | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class Subject:
    """A model to be judged, and how it is run.

    Attributes:
        name: for people.
        model: what is loaded.
        model_sha256: fingerprint of the base or whole model.
        dtype: of the matrix products.
        dequantized: its base was quantized in training, but the device has no kernels for it.
        context: longest conversation in tokens, if known.
        loss_tokens: padded tokens in one pass of the loss.
        answer_tokens: padded tokens in one pass of generation.
    """

    name: str
    model: TunedModel
    model_sha256: str
    dtype: str
    dequantized: bool
    context: int | None
    loss_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class EvalJob:
    """What the worker does.

    Attributes:
        request: what was asked, with absolute paths.
        run: whose held-out rows are judged; None for `request.dataset`.
        subject: the model.
        other: the model that it is held against.
        max_length: longest row in tokens.
        train_on: turns that the loss is over.
        truncation_strategy: of longer rows.
        backend: whose `mst_activate` is called.
        torch_device: what torch calls the device.
        attention: transformers' attention implementation.
        threads: CPU threads.
        environment: variables set before the worker's interpreter starts.
    """

    request: EvalRequest
    run: str | None
    subject: Subject
    other: Subject | None
    max_length: int
    train_on: str
    truncation_strategy: str
    backend: str
    torch_device: str
    attention: str
    threads: int
    environment: Mapping[str, str]


def prepare_evaluation(
    request: EvalRequest, environ: Mapping[str, str], keys: KeyRing = NO_KEYS
) -> EvalJob:
    """Find the models and the device, and check what can be checked without torch or data.

    Args:
        request: what was asked.
        environ: the process's environment.
        keys: the user's, for encrypted runs.

    Raises:
        MstError: whatever stands in the way.
    """
    from mst.probe import backend_environment, machine_facts, select_device
    from mst.registry import load

    check_names(request.metrics)
    _check_files(request)
    run = run_of(request.target)
    name, model = choose_model(request.target, request.checkpoint, environ, keys=keys)
    if run is None and not request.dataset and not request.harness:
        raise UsageError(
            f"mst eval: {name} is a model, not a run, so it has no held-out rows. Pass rows:"
            " --dataset FILE."
        )
    registry = load()
    report, chosen, capabilities = select_device(machine_facts(registry), request.device)
    (torch_device,) = torch_names((chosen,), capabilities)
    subject = _subject(name, model, run, chosen, capabilities, keys)
    other = _other(request.compare, subject, run, chosen, capabilities, environ, keys)
    trained = TrainRequest()
    if run is not None:
        trained = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    most = min(DEFAULT_MAX_LENGTH, subject.context or DEFAULT_MAX_LENGTH)
    return EvalJob(
        request=request,
        run=str(run.absolute()) if run is not None and not request.dataset else None,
        subject=subject,
        other=other,
        max_length=request.max_length or trained.max_length or most,
        train_on=trained.train_on,
        truncation_strategy=trained.truncation_strategy,
        backend=report.name,
        torch_device=torch_device,
        attention=capabilities.attention[0],
        threads=chosen.compute_units or 1,
        environment=backend_environment(registry, report.name, (chosen,)),
    )


def _check_files(request: EvalRequest) -> None:
    from mst.evaluate.user_metric import DEFAULT_NAME
    from mst.user_function import split_spec

    if request.metric_file is not None:
        file, _ = split_spec(request.metric_file, DEFAULT_NAME)
        if not Path(file).is_file():
            raise EvaluationError(
                f"--metric-file {file}: there is no such file. Pass a Python file, and after a"
                " colon the function's name."
            )
    if request.harness and (request.tasks_dir is None or not Path(request.tasks_dir).is_dir()):
        raise EvaluationError(
            f"--harness takes tasks from local files, and --tasks-dir {request.tasks_dir} is no"
            " directory. Pass the one that holds the tasks' YAML files."
        )
    if request.predictions is not None:
        check_target(Path(request.predictions), "--predictions")


def check_target(path: Path, flag: str) -> None:
    """Make sure that a file can be written before hours are spent on its contents.

    Raises:
        EvaluationError: its directory is not there, or it is a directory itself.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise EvaluationError(
            f"{flag} {path} can't be written: it is a directory, or its directory is not there."
            " Pass a file in a directory that exists."
        )


def _subject(
    name: str,
    model: TunedModel,
    run: Path | None,
    device: DeviceFacts,
    capabilities: Capabilities,
    keys: KeyRing,
) -> Subject:
    """Return a model with the dtype of its training, where the device has it."""
    dtype = fastest_dtype(device)
    if run is not None:
        trained = rundir.read_document(Plan, run, rundir.PLAN).compute_dtype
        dtype = trained if trained in device.dtypes else dtype
    dequantized = model.quantization not in capabilities.quantization
    if model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise EvaluationError(
            f"{name} was trained on weights in {model.quantization}, which bitsandbytes makes, and"
            " it is not installed here. Install it: python -m pip install 'mst-train[qlora]'"
        )
    facts = facts_of(model, keys)
    loss_tokens, answer_tokens = token_budget(facts, device.memory_free_bytes, FLOAT_BYTES[dtype])
    return Subject(
        name=name,
        model=model,
        model_sha256=fingerprint_of(model),
        dtype=dtype,
        dequantized=dequantized,
        context=facts.max_position_embeddings,
        loss_tokens=loss_tokens,
        answer_tokens=answer_tokens,
    )


def _other(
    compare: str | None,
    subject: Subject,
    run: Path | None,
    device: DeviceFacts,
    capabilities: Capabilities,
    environ: Mapping[str, str],
    keys: KeyRing,
) -> Subject | None:
    """Return the model that the subject is held against."""
    if compare is None:
        return None
    if compare != BASE:
        name, model = choose_model(compare, None, environ, keys=keys)
        return _subject(name, model, run_of(compare), device, capabilities, keys)
    if run is None:
        raise UsageError(
            f"--compare base: {subject.name} is a model, not a run, so its base is not known."
            " Pass the other model: --compare MODEL."
        )
    manifest = rundir.read_manifest(run)
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    base = str(base_model(run, manifest, request))
    model = replace(
        subject.model, weights=base, tokenizer=base, adapter=None, step=None, encrypted_run=None
    )
    return _subject(f"{manifest.model}, the base", model, run, device, capabilities, keys)


def evaluate(job: EvalJob, environ: Mapping[str, str], keys: KeyRing = NO_KEYS) -> EvalReport:
    """Run the worker in the foreground and return what it found.

    Args:
        job: as `prepare_evaluation` made it.
        environ: the user's environment.
        keys: open encrypted rows and runs; the worker inherits them.

    Raises:
        MstError: it failed, and has said why on standard error.
    """
    environment = worker_environment(environ, job.environment)
    _unlock(job, keys)
    # A file without a name, which holds the report alone: figures, and no row.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer, handed_down(keys) as held:
        handles = [answer.fileno(), *([] if held is None else [held])]
        arguments = [serial.dumps(job), *map(str, handles)]
        code = run_worker("mst.evaluate.worker", arguments, environment, handles)
        if code == EXIT_INTERRUPTED:
            raise Interrupted("nothing was written.")
        if code:
            cause = how_it_ended(code, "Pass a smaller --batch-size")
            failed = MstError(f"nothing was measured: {cause}.")
            failed.exit_code = code if code < 128 else failed.exit_code
            raise failed
        answer.seek(0)
        return serial.loads(EvalReport, answer.read())


def _unlock(job: EvalJob, keys: KeyRing) -> None:
    """Open the encrypted rows once, so that a passphrase is asked for here and not by the worker.

    Raises:
        EncryptionError: a key is missing or wrong.
    """
    from mst.data.encrypted import is_encrypted
    from mst.data.sources import find_source

    paths = [path for spec in job.request.dataset for path in find_source(spec).files]
    if job.run is not None:
        manifest = rundir.read_manifest(Path(job.run))
        paths = [Path(each.path) for each in (*manifest.data, *manifest.val_data)]
    for path in filter(is_encrypted, paths):
        if path.exists():  # the worker says what is missing
            keys.open(path).close()
