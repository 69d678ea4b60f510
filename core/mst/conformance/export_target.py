"""The kit's part for export targets: a tiny model is exported, and each promise of the hooks tried.

Run as `python -m mst.conformance.export_target NAME WORKSPACE HANDLE`: writes one JSON line a check
to the open file descriptor. The plugin's code runs in that process alone.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst.conformance.findings import Finding, Result, failed, passed, skipped, verdict
from mst.conformance.kit import results_of, write_results
from mst.conformance.tiny import HEADS, tiny_model
from mst.errors import MstError, UsageError
from mst.export import Bounds, ExportPlan, ExportReport, ExportRequest
from mst.registry import load
from mst.seal.jail.holder import asking
from mst.seal.jail.seal import JailRequest, Scene

# One check quantizes the tiny model; on a loaded machine gptqmodel took a minute.
SECONDS = 600.0
_ROWS, _ROW_TOKENS = 16, 32
_ADVICE = "run `mst export` with it under a debugger"


@dataclass
class _Trial:
    """What the checks share; later ones look at what earlier ones have left."""

    name: str
    workspace: Path
    relay: Any = None
    plan: ExportPlan | None = None
    report: ExportReport | None = None
    seen_torch: bool = False
    written: dict[str, bytes] = field(default_factory=dict)

    def request(self, place: str) -> ExportRequest:
        """Return a request that exports the tiny model to a directory of its own."""
        output, work = self.workspace / place, self.workspace / f"{place}.work"
        for each in (output, work):
            shutil.rmtree(each, ignore_errors=True)
            each.mkdir()
        calibrated = self.plan is not None and self.plan.calibrated
        return ExportRequest(
            model_dir=str(self.workspace / "model"),
            output_dir=str(output),
            work_dir=str(work),
            calibration=_rows() if calibrated else (),
            threads=1,
            environ=dict(os.environ),
        )


def _rows() -> list[list[int]]:
    """Return token ids that occur nowhere else in this order."""
    return [
        [3 + (7 * row * row + 11 * place + row) % 250 for place in range(_ROW_TOKENS)]
        for row in range(_ROWS)
    ]


def _loads(trial: _Trial) -> Finding:
    registry = load()
    trial.relay = registry.exports.get(trial.name)
    if trial.relay is None:
        reasons = [each.reason for each in registry.records if each.name == trial.name]
        found = "; ".join(filter(None, reasons)) or "no entry point in group mst has it"
        return failed(found, "`mst plugins` lists what was found")
    return passed("its hooks are whole")


def _plans(trial: _Trial) -> Finding:
    request = ExportRequest(str(trial.workspace / "model"))
    plan = trial.relay.mst_export_check(request=request)
    trial.seen_torch = "torch" in sys.modules
    if not isinstance(plan, ExportPlan):
        return failed(f"mst_export_check returned {type(plan).__name__}", "return an ExportPlan")
    trial.plan = plan
    bounds: Bounds = plan.bounds
    faults = [
        f"{name} is {value!r}"
        for name, value, good in (
            ("scheme", plan.scheme, bool(plan.scheme.strip())),
            ("disk_bytes", plan.disk_bytes, plan.disk_bytes > 0),
            ("memory_bytes", plan.memory_bytes, plan.memory_bytes > 0),
            ("perplexity_ratio", bounds.perplexity_ratio, 1 <= bounds.perplexity_ratio < 10),
            ("mean_kl", bounds.mean_kl, 0 < bounds.mean_kl < 5),
            ("agreement", bounds.agreement, 0 < bounds.agreement <= 1),
        )
        if not good
    ]
    return verdict(faults, "a bound that everything meets compares nothing", plan.scheme)


def _light(trial: _Trial) -> Finding:
    if trial.seen_torch:
        return failed("torch was imported", "import it inside mst_export: planning needs none")
    return passed("torch was not imported")


def _refuses(trial: _Trial) -> Finding:
    request = ExportRequest(str(trial.workspace / "model"), bits=1, method="no such method")
    try:
        trial.relay.mst_export_check(request=request)
    except MstError as error:
        return passed(f"{type(error).__name__}: {str(error)[:120]}")
    except Exception as error:
        return failed(f"raised {type(error).__name__}", "raise an MstError that says what would do")
    return skipped("the target takes any bits and method, as one that has neither does")


def _writes(trial: _Trial) -> Finding:
    before = _files(trial.workspace)
    request = trial.request("first")
    report = trial.relay.mst_export(request=request)
    if not isinstance(report, ExportReport):
        return failed(f"mst_export returned {type(report).__name__}", "return an ExportReport")
    trial.report = report
    output = Path(request.output_dir)
    trial.written = {str(each.relative_to(output)): each.read_bytes() for each in _walk(output)}
    outside = [each for each in _files(trial.workspace) - before if not each.startswith(("first",))]
    faults = [f"wrote {each} outside output_dir and work_dir" for each in sorted(outside)[:3]]
    if sorted(report.files) != sorted(trial.written):
        faults.append(f"files names {len(report.files)} files, {len(trial.written)} are there")
    if report.format != trial.name:
        faults.append(f"format is {report.format!r}")
    size = sum(map(len, trial.written.values()))
    return verdict(
        faults, "name every file, and write nowhere else", f"{len(trial.written)} files", bytes=size
    )


def _forecasts(trial: _Trial) -> Finding:
    assert trial.plan is not None
    size = sum(map(len, trial.written.values()))
    # Tokenizer and config are most of so small a model, and no target counts them to the byte.
    side = sum(len(data) for name, data in trial.written.items() if ".safetensors" not in name)
    if size > 1.1 * (trial.plan.disk_bytes + side):
        return failed(
            f"{size} bytes were written, disk_bytes is {trial.plan.disk_bytes}",
            "count all that is written: a full disk must be told of before the work",
        )
    return passed(f"{size} bytes, {trial.plan.disk_bytes} and side files were forecast")


def _stands_alone(trial: _Trial) -> Finding:
    from mst.export.gate import side_faults

    faults = side_faults(trial.workspace / "first", trial.workspace / "model")
    return verdict(
        faults, "copy tokenizer, template and config from model_dir", "as the merged model's"
    )


def _computes(trial: _Trial) -> Finding:
    from mst.export.gate import put_weights, weight_faults

    assert trial.plan is not None
    trained, candidate = _model(trial), _model(trial)
    weights = trial.relay.mst_export_weights(directory=str(trial.workspace / "first"))
    faults = put_weights(candidate, weights)
    if not faults and trial.plan.bounds.weight_error is not None:
        faults = weight_faults(trained, candidate, trial.plan.bounds.weight_error)
    return verdict(
        faults[:5], "yield what an engine computes with, unpacked", "every weight, in its shape"
    )


def _rounds(trial: _Trial) -> Finding:
    from mst.export.gate import put_weights

    assert trial.plan is not None
    if not trial.plan.bounds.beats_rounding:
        return skipped("its bounds have no beats_rounding")
    if not hasattr(trial.relay, "mst_export_rounded"):
        return failed("mst_export_rounded is missing", "implement it, or drop beats_rounding")
    weights = trial.relay.mst_export_rounded(request=trial.request("rounded"))
    return verdict(put_weights(_model(trial), weights)[:5], "yield every weight", "every weight")


def _repeats(trial: _Trial) -> Finding:
    request = trial.request("second")
    trial.relay.mst_export(request=request)
    output = Path(request.output_dir)
    again = {str(each.relative_to(output)): each.read_bytes() for each in _walk(output)}
    unlike = sorted(
        name for name in again.keys() | trial.written.keys()
        if again.get(name) != trial.written.get(name)
    )  # fmt: skip
    return verdict(
        [f"{name} differs" for name in unlike[:5]],
        "the same model and rows must give the same bytes: an auditor compares hashes",
        "the same bytes twice",
    )


def _keeps_rows(trial: _Trial) -> Finding:
    assert trial.plan is not None
    if not trial.plan.calibrated:
        return skipped("it gets no rows")
    marks = [struct.pack(f"<8{kind}", *row[:8]) for row in _rows() for kind in ("i", "q", "H")] + [
        ", ".join(map(str, row[:8])).encode() for row in _rows()
    ]
    found = [
        str(each.relative_to(trial.workspace))
        for place in ("first", "first.work")
        for each in _walk(trial.workspace / place)
        if any(mark in each.read_bytes() for mark in marks)
    ]
    return verdict(
        [f"{name} holds calibration rows" for name in found],
        "rows are private: keep them in memory, or encrypted",
        "no token ids in its files",
    )


def _model(trial: _Trial) -> Any:
    import torch

    from mst.training.adapters import load_model

    return load_model(trial.workspace / "model", "float32", "sdpa", torch.device("cpu")).eval()


def _walk(directory: Path) -> Iterator[Path]:
    return (each for each in sorted(directory.rglob("*")) if each.is_file())


def _files(directory: Path) -> set[str]:
    return {str(each.relative_to(directory)) for each in _walk(directory)}


# Id, promise, and how it is tried; in the order of an export.
CHECKS: tuple[tuple[str, str, Callable[[_Trial], Finding]], ...] = (
    ("export.loads", "the plugin loads, with the hooks of an export target", _loads),
    ("export.plans", "the plan says scheme, sizes and bounds that can be broken", _plans),
    ("export.light", "planning imports no torch", _light),
    ("export.refuses", "bits and methods that it has not are refused in words", _refuses),
    ("export.writes", "it writes where it was told, and says what", _writes),
    ("export.forecasts", "it writes no more than its plan says", _forecasts),
    ("export.alone", "tokenizer, template and config are the model's", _stands_alone),
    ("export.computes", "what it computes with can be read back, near what was trained", _computes),
    ("export.rounds", "plain rounding can be read where it has to be beaten", _rounds),
    ("export.repeats", "a second export gives the same bytes", _repeats),
    ("export.private", "calibration rows are in none of its files", _keeps_rows),
)


# Without these there is nothing to look at.
_NEEDED = ("export.loads", "export.plans", "export.writes")


def _prepare(workspace: Path) -> None:
    """Make the tiny model, as a merge leaves one."""
    # As many as there are heads: gptqmodel's AWQ takes layers of 64 outputs and their multiples.
    tiny = tiny_model(workspace, HEADS)
    config = json.loads((tiny / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tiny / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8")
    (tiny / "generation_config.json").write_text('{"eos_token_id": 2}', encoding="utf-8")
    tiny.rename(workspace / "model")


def run_checks(name: str, workspace: Path) -> list[Result]:
    """Return the results of all checks of an export target, run in a process of their own.

    Args:
        name: as users write it after `--format`.
        workspace: an empty directory.

    Raises:
        UsageError: no target and no plugin has that name.
    """
    registry = load()
    if name not in registry.exports and all(each.name != name for each in registry.records):
        raise UsageError(
            f"no export target {name!r} is installed here (installed:"
            f" {', '.join(sorted(registry.exports)) or 'none'}). `mst plugins` lists every plugin."
        )
    lines = workspace / "results.jsonl"
    arguments = (name, str(workspace), str(lines))
    module = "mst.conformance.export_target"
    return results_of(module, arguments, lines, CHECKS, SECONDS, _ADVICE)


def main(argv: Sequence[str]) -> int:
    """Run the checks and write their results."""
    from mst.extensions import hide_extensions, hide_packages

    name, workspace, lines = argv[0], Path(argv[1]), Path(argv[2])
    hide_extensions()
    hide_packages()
    _prepare(workspace)
    trial = _Trial(name, workspace)
    # A process that the target starts may write there, and nowhere on a network.
    jailed = asking(JailRequest(), Scene(outputs=(str(workspace),)))
    with jailed:
        write_results(CHECKS, trial, _NEEDED, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
