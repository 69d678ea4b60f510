"""Run as `python -m mst.export.worker JOB [KEYS]`: export a run, and compare what comes out."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst import serial
from mst.data.encode import Example
from mst.durable import seal_directory, why_unwritten, write_text
from mst.errors import EXIT_REFUSED, Interrupted, MstError, RunError
from mst.evaluate.batching import DEFAULT_ROWS, batches
from mst.evaluate.labels import questions, restricted_answers
from mst.evaluate.reading import generated, read, read_shared
from mst.export import ExportReport
from mst.export.artefact import CHECK, Artefact, MergeCheck, describe
from mst.export.figures import Distance, Reference, distance, reference
from mst.export.gate import (
    Quality,
    compared,
    lost_words,
    merge_faults,
    put_weights,
    quality_faults,
    side_faults,
    weight_faults,
)
from mst.export.job import ExportJob, TargetJob, ask, request_for
from mst.export.loaded import cast_faults, loaded_weights, lost_share
from mst.export.meanwhile import GoOn, Meanwhile
from mst.export.rows import PROMPTS, ExportRows, rows_of
from mst.extensions import hide_extensions, hide_packages
from mst.merge import REPORT, MergeReport
from mst.registry import PluginError, Registry, load
from mst.seal.jail import words
from mst.seal.jail.seal import entered
from mst.seal.keys.ring import KeyRing, inherited
from mst.seal.redaction import WITHHELD, place_of
from mst.training.adapters import merge_and_unload
from mst.training.quantization import compute_in_float32
from mst.tuned import TunedModel, load_dequantized
from mst.tuned import load as load_tuned
from mst.worker_process import StopAsked, die_with_parent, guarded

if TYPE_CHECKING:
    import torch
    from rich.console import Console

_ANSWER_TOKENS = 32
# Prompts that are read in one pass have so many tokens together.
_ASKED_TOKENS = 4096
# Rows that are asked for their answer in a breath: a stop waits for no more.
_ASKED_AT_ONCE = 40
# From which share of lost values on they are named as the reason.
_MOSTLY = 0.5


@dataclass(frozen=True)
class _Shared:
    """What all targets of an export are compared with.

    Attributes:
        job: what to do.
        registry: the plugins.
        rows: of the run.
        trained: the merged model, float32.
        reference: returns what it says of the judged rows.
        report: of the merge on disk.
        check: of the merge in memory.
        right: says which asked rows the trained model answers rightly; none where nobody can know.
        meanwhile: computes while a target quantizes.
        console: for the user.
    """

    job: ExportJob
    registry: Registry
    rows: ExportRows = field(repr=False)
    trained: torch.nn.Module
    reference: Callable[[], Reference]
    report: MergeReport
    check: MergeCheck
    right: Callable[[], Sequence[bool]]
    meanwhile: Meanwhile
    console: Console


def work(job: ExportJob, keys: KeyRing) -> bool:
    """Make every target's artefact; return whether all have passed.

    Raises:
        MstError: one could not be made.
        Interrupted: the user stopped it.
    """
    import torch
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    torch.set_num_threads(job.threads)
    registry = load()
    options, merged = job.options, Path(job.merged)
    with console.status("reading the run's rows"):
        rows = rows_of(
            Path(job.run), merged, options.calibration, options.calibration_rows, registry, keys
        )
    with console.status("comparing the merge with base and adapter"):
        report = serial.load(MergeReport, merged / REPORT)
        trained, check = _merged(job, rows, keys)
        candidate = copy.deepcopy(trained)
        faults = [*check.faults, *put_weights(candidate, loaded_weights(merged))]
        faults += cast_faults(trained, candidate, report.dtype)
        if faults:
            raise RunError(
                f"the merge in {merged} is not what was trained: {faults[0]}"
                f" ({len(faults)} faults). Remove it, and export again; if that fails too, please"
                " report the architecture."
            )
        if not check.faults:
            # Without it, the next export compares again.
            with contextlib.suppress(OSError):
                write_text(merged / CHECK, serial.dumps(check))
    with Meanwhile(job.beside) as meanwhile:
        judged = meanwhile.begin(_reference, trained, rows.judged)
        right = meanwhile.begin(_right, trained, rows)
        shared = _Shared(
            job, registry, rows, trained, judged, report, check, right, meanwhile, console
        )
        # A list: each target is made, though one before it has failed.
        return all([_made(shared, each, candidate) for each in job.targets])


def _merged(job: ExportJob, rows: ExportRows, keys: KeyRing) -> tuple[torch.nn.Module, MergeCheck]:
    """Return the merged model in float32, and how it agrees with base and adapter.

    What an earlier export has found of these weights holds on: the caller makes sure that the files
    of the merge are still what comes out here, bit for bit.
    """
    import torch

    cpu, source = torch.device("cpu"), job.source
    found = _recorded(Path(job.merged))
    if found is not None:
        return _one(load_dequantized(source, job.attention, cpu, keys=keys), source), found
    model = load_tuned(source, "float32", job.attention, cpu, keys)
    if source.quantization != "none":
        compute_in_float32(model)
    prompts = [each.prompt for each in questions(_prompt_rows(rows), rows.tokenizer, rows.template)]
    before, answers = _said(model, rows, prompts)
    if source.quantization != "none":
        model = load_dequantized(source, job.attention, cpu, keys=keys)
    model = _one(model, source)
    after, again = _said(model, rows, prompts)
    largest = max(
        (float((a - b).abs().max()) for a, b in zip(before, after, strict=True)), default=0.0
    )
    same = sum(a == b for a, b in zip(answers, again, strict=True))
    faults = merge_faults(largest, same, len(prompts))
    return model, MergeCheck(len(prompts), same, largest, tuple(faults))


def _one(model: torch.nn.Module, source: TunedModel) -> torch.nn.Module:
    return model if source.adapter is None else merge_and_unload(model)


def _recorded(merged: Path) -> MergeCheck | None:
    """Return what was found of a merge before; None where nobody knows."""
    try:
        return serial.load(MergeCheck, merged / CHECK)
    except (OSError, ValueError):
        return None


def _prompt_rows(rows: ExportRows) -> list[Any]:
    """Return rows that end in an answer, so that there is a prompt before it."""
    found = [each.row for each in rows.judged if each.row.messages]
    return [row for row in found if row.messages[-1].role == "assistant"][:PROMPTS]


def _said(
    model: torch.nn.Module, rows: ExportRows, prompts: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Return the logits after the prompts of each pass, (rows, vocabulary), and greedy answers."""
    import torch

    tokenizer = rows.tokenizer
    logits, answers = [], []
    with torch.inference_mode():
        start = read_shared(model, prompts)
        for places in batches(list(map(len, prompts)), DEFAULT_ROWS, _ASKED_TOKENS):
            pass_prompts = [prompts[place] for place in places]
            prefix = read(model, pass_prompts, tokenizer.pad_token_id, start)
            logits.append(prefix.logits)
            answers += generated(model, prefix, tokenizer.eos_token_ids, _ANSWER_TOKENS)
    return logits, answers


def _reference(go_on: GoOn, trained: torch.nn.Module, judged: Sequence[Example]) -> Reference:
    return reference(trained, judged, go_on)


def _right(go_on: GoOn, model: torch.nn.Module, rows: ExportRows) -> list[bool]:
    """Return whether each asked row is answered rightly out of the set of answers."""
    import torch

    found: list[bool] = []
    for start in range(0, len(rows.asked), _ASKED_AT_ONCE):
        go_on()
        part = rows.asked[start : start + _ASKED_AT_ONCE]
        found += restricted_answers(
            model, part, rows.answers, rows.tokenizer, rows.template, torch.float32
        )
    return found


def _rounding(
    go_on: GoOn, shared: _Shared, target: TargetJob, candidate: torch.nn.Module
) -> Distance | None:
    """Return how far plain rounding to a target's scheme is; None where it isn't held against that.

    Changes the candidate's weights.
    """
    if not target.plan.bounds.beats_rounding:
        return None
    request = request_for(shared.job.options, shared.job.merged, dtype=shared.report.dtype)
    rounded = ask(shared.registry, target.name, "mst_export_rounded", request=request)
    put_weights(candidate, _while_waited_for(go_on, rounded))
    return distance(shared.reference(), candidate, go_on)


def _while_waited_for(
    go_on: GoOn, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for each in weights:
        go_on()
        yield each


def _made(shared: _Shared, target: TargetJob, candidate: torch.nn.Module) -> bool:
    """Make one artefact, and return whether it has passed; it appears whole or not at all."""
    directory = Path(target.directory)
    part = directory.with_name(f".{directory.name}.part")
    work_dir = directory.with_name(f".{directory.name}.work")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        work_dir.mkdir(exist_ok=True, mode=0o700)
        rounding = shared.meanwhile.begin(_rounding, shared, target, candidate)
        report = _written(shared, target, part, work_dir)
        with shared.console.status(f"{target.name}: comparing with what was trained"):
            quality, faults = _judged(shared, target, part, candidate, rounding())
        artefact = Artefact(
            target=target,
            report=report,
            quality=quality,
            faults=tuple(faults),
            judged_from=shared.rows.judged_from,
            calibration_rows=len(shared.rows.calibration) if target.plan.calibrated else 0,
            merge=shared.report,
            check=shared.check,
        )
        describe(part, shared.job, artefact)
        if directory.exists():
            shutil.rmtree(directory)
        seal_directory(part, directory)
    except OSError as error:
        raise _unwritten(target, error.strerror) from None
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on where it can.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            work_dir.rmdir()  # unless there is something to go on from
    shutil.rmtree(work_dir, ignore_errors=True)
    return not faults


def _unwritten(target: TargetJob, reason: str | None) -> RunError:
    return RunError(
        f"cannot write {target.directory}: {reason}. Nothing was left there. Free some space, or"
        " pass another --output-dir."
    )


def _written(shared: _Shared, target: TargetJob, part: Path, work_dir: Path) -> ExportReport:
    job = shared.job

    def tell(line: str) -> None:
        shared.console.print(f"{target.name}: {line}", soft_wrap=True)

    request = request_for(
        job.options,
        job.merged,
        output_dir=str(part),
        work_dir=str(work_dir),
        calibration=shared.rows.calibration if target.plan.calibrated else (),
        threads=job.threads,
        environ=dict(os.environ),
        tell=tell,
        dtype=shared.report.dtype,
    )
    try:
        report = ask(shared.registry, target.name, "mst_export", request=request)
    except PluginError as error:
        cause = error.__cause__ or error
        if reason := why_unwritten(cause):
            raise _unwritten(target, reason) from None
        raise PluginError(
            f"the export target {target.name!r} raised {place_of(cause)} ({WITHHELD}). Mend it"
            " there, or pass another --format."
        ) from None
    if not isinstance(report, ExportReport):
        raise MstError(f"the export target {target.name!r} answered with no ExportReport.")
    return report


def _judged(
    shared: _Shared,
    target: TargetJob,
    part: Path,
    candidate: torch.nn.Module,
    rounding: Distance | None,
) -> tuple[Quality | None, list[str]]:
    """Return what was measured of an artefact, and what is wrong with it."""
    bounds, merged = target.plan.bounds, Path(shared.job.merged)
    faults = side_faults(part, merged)
    weights = ask(shared.registry, target.name, "mst_export_weights", directory=str(part))
    faults += put_weights(candidate, weights)
    if bounds.weight_error is not None and not faults:
        faults += weight_faults(shared.trained, candidate, bounds.weight_error)
    if bounds.exact:
        faults += cast_faults(shared.trained, candidate, shared.report.dtype)
    if faults:
        return None, faults
    found = distance(shared.reference(), candidate)
    answers = compared(shared.right(), _right(lambda: None, candidate, shared.rows))
    quality = Quality(found, rounding, answers)
    faults = quality_faults(quality, bounds)
    if faults and bounds.exact:
        faults += _why_cast(shared, candidate)
    return quality, faults


def _why_cast(shared: _Shared, candidate: torch.nn.Module) -> list[str]:
    """Return in words why weights that are what was trained, cast, are no good; else nothing."""
    source, dtype = shared.job.source, shared.report.dtype
    if source.adapter is None or source.quantization != "none":
        return []
    share = lost_share(loaded_weights(Path(source.weights)), shared.trained, candidate)
    return [] if share < _MOSTLY else [lost_words(share, dtype)]


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes; exit 3 when an artefact has failed."""
    die_with_parent()
    stop = StopAsked()
    hide_extensions()
    # What a target starts runs where this process runs.
    entered(words.inherited(os.environ))
    job = serial.from_json(ExportJob, json.loads(argv[0]))
    hide_packages(keep=() if job.source.quantization == "none" else ("bitsandbytes",))
    keys = inherited(int(argv[1]) if len(argv) > 1 else None)
    passed: list[bool] = []
    code = guarded(lambda: passed.append(work(job, keys)), stop=stop)
    return code or (0 if all(passed) else EXIT_REFUSED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
