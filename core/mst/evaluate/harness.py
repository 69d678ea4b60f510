"""Tasks of lm-evaluation-harness from local files, run in an environment of its own.

The harness keeps copies of the rows and of the answers while it works. It is given a directory in
memory for them, which is removed with what is in it.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mst
from mst import rundir
from mst.errors import EvaluationError
from mst.evaluate.figures import RESAMPLES, Statistic, figure, mean_of
from mst.evaluate.job import EvalJob, Subject
from mst.evaluate.report import EvalReport, Judged
from mst.launch import worker_environment
from mst.seal.jail.holder import sealed

# In memory on Linux; elsewhere the usual place for temporary files.
_MEMORY = Path("/dev/shm")
_INSTALL = (
    "It is not a part of mst, whose libraries it may not share. Make it an environment:"
    " python -m venv lm-eval && lm-eval/bin/python -m pip install 'lm-eval[hf]'; then pass"
    " --harness-python lm-eval/bin/python"
)


def run_tasks(job: EvalJob, environ: Mapping[str, str]) -> EvalReport:
    """Run the job's tasks with one model, or two, and return the figures.

    Raises:
        EvaluationError: the harness is not there, a model is of a kind that it can't load, or it
            fails.
    """
    python = job.request.harness_python or sys.executable
    _check_installed(python)
    subjects = [each for each in (job.subject, job.other) if each is not None]
    for each in subjects:
        _check_subject(each, job.request.apply_chat_template)
    found = [_run(python, job, each, environ) for each in subjects]
    ours, theirs = found[0], found[-1]
    names = [name for name in ours if name in theirs]
    paired = len(found) > 1
    return EvalReport(
        mst_version=mst.__version__,
        created=rundir.now(),
        device=job.torch_device,
        rows_of=f"lm-evaluation-harness, {', '.join(job.request.harness)}",
        data=(),
        rows=max((len(each.rows or ()) for each in ours.values()), default=0),
        left_out=0,
        tokens=0,
        label_tokens=0,
        model=_judged(job.subject),
        compared_with=None if job.other is None else _judged(job.other),
        figures=tuple(
            figure(ours[name], theirs[name] if paired else None, job.request.seed) for name in names
        ),
        resamples=RESAMPLES,
        seed=job.request.seed,
    )


def _judged(subject: Subject) -> Judged:
    step = subject.model.step
    return Judged(subject.name, subject.model_sha256, step, subject.dtype, None, None, 0.0)


def _check_installed(python: str) -> None:
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    try:
        missing = subprocess.run([python, "-c", look], capture_output=True, check=False).returncode
    except OSError as error:
        raise EvaluationError(
            f"--harness-python {python} can't be run: {error.strerror}. Pass the Python of the"
            " environment that lm-evaluation-harness is installed in."
        ) from None
    if missing:
        raise EvaluationError(
            f"--harness needs lm-evaluation-harness, which {python} does not have. {_INSTALL}"
        )


def _check_subject(subject: Subject, chat: bool) -> None:
    if subject.model.encrypted_run is not None:
        raise EvaluationError(
            f"{subject.name} is encrypted, and the harness reads plain files. Merge it first, which"
            " writes a plain model, and give that: mst merge RUN --key-file FILE"
        )
    if subject.model.quantization != "none":
        raise EvaluationError(
            f"{subject.name} was trained on weights in {subject.model.quantization}, which the"
            " harness would quantize in its own way. Merge it first, and give the merged model:"
            " mst merge RUN"
        )
    if chat and subject.model.template is not None:
        raise EvaluationError(
            f"{subject.name} was trained with --template {subject.model.template}, and the harness"
            " takes the tokenizer's own. Merge it first, which writes the template into the model:"
            " mst merge RUN"
        )


def _run(
    python: str, job: EvalJob, subject: Subject, environ: Mapping[str, str]
) -> dict[str, Statistic]:
    """Run the harness with one model; return its figures by name."""
    place = str(_MEMORY) if _MEMORY.is_dir() else None
    with (
        _stoppable(),
        tempfile.TemporaryDirectory(prefix="mst-harness-", dir=place) as name,
    ):
        directory = Path(name)
        command = [python, "-m", "lm_eval", "run", *_arguments(job, subject, directory)]
        environment = {
            **worker_environment(environ, job.environment),
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(directory / "cache"),
            "TMPDIR": name,
            "LMEVAL_LOG_LEVEL": "ERROR",
        }
        with (directory / "log").open("wb") as log:
            done = subprocess.run(
                sealed(command), env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            )
        results = sorted((directory / "out").rglob("results_*.json"))
        # It can fail at its last step, printing a table, when the results are there already.
        if not results:
            raise _failed(done.returncode, directory / "log", subject)
        return _statistics(json.loads(results[-1].read_text("utf-8")), results[-1].parent)


def _arguments(job: EvalJob, subject: Subject, directory: Path) -> list[str]:
    """Return the harness's command line; the model's parts are linked into `directory`."""
    request, parts = job.request, {"pretrained": subject.model.weights}
    parts["tokenizer"] = subject.model.tokenizer
    if subject.model.adapter is not None:
        parts["peft"] = subject.model.adapter
    values = {"dtype": subject.dtype}
    for name, path in parts.items():
        # Linked, because the harness would split a path at a comma.
        (directory / name).symlink_to(path)
        values[name] = str(directory / name)
    arguments = {
        "--model": "hf",
        "--model_args": ",".join(f"{name}={value}" for name, value in values.items()),
        "--tasks": ",".join(request.harness),
        "--include_path": str(request.tasks_dir),
        "--device": job.torch_device,
        "--batch_size": str(request.batch_rows),
        "--output_path": str(directory / "out"),
    }
    if request.limit is not None:
        arguments["--limit"] = str(request.limit)
    flat = [text for pair in arguments.items() for text in pair]
    return [*flat, "--log_samples", *(["--apply_chat_template"] * request.apply_chat_template)]


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that the directory is removed."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(code: int, log: Path, subject: Subject) -> EvaluationError:
    """Return an error with the type of the harness's last exception: its text may hold a row."""
    text = log.read_text("utf-8", "replace")
    types = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception))\b", text, re.MULTILINE)
    reason = f" ({types[-1]})" if types else ""
    return EvaluationError(
        f"lm-evaluation-harness ended with code {code}{reason} while it evaluated {subject.name},"
        " before it had a result. Check that --tasks-dir holds the tasks and that their data are"
        " local files (dataset_path: json, dataset_kwargs: data_files); `lm_eval validate --tasks"
        " NAME --include_path DIR` says more."
    )


def _statistics(results: Mapping[str, Any], directory: Path) -> dict[str, Statistic]:
    """Return the harness's figures; those that are means over rows, with their rows."""
    found: dict[str, Statistic] = {}
    for task, values in results["results"].items():
        samples = _samples(directory, task)
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            name = f"{task} {metric}" + ("" if filtered == "none" else f" {filtered}")
            rows = [each.get(metric) for each in samples if each.get("filter") == filtered]
            found[name] = _statistic(name, float(value), rows, better.get(metric) is not False)
    return found


def _samples(directory: Path, task: str) -> list[dict[str, Any]]:
    files = sorted(directory.glob(f"samples_{task}_2*.jsonl"))
    lines = files[-1].read_text("utf-8").splitlines() if files else []
    return [json.loads(line) for line in lines]


def _statistic(name: str, value: float, rows: Sequence[Any], higher: bool) -> Statistic:
    numbers = [float(each) for each in rows if isinstance(each, (int, float))]
    if numbers and len(numbers) == len(rows):
        found = mean_of(name, numbers, higher)
        # Some metrics, such as corpus BLEU, are no means over rows, whatever a row's entry is.
        if abs(sum(numbers) / len(numbers) - value) < 1e-9 * max(1.0, abs(value)):
            return found
    return Statistic(name, None, lambda sums: value, higher, whole=value)
