"""The report that a vendor publishes: what was checked on what, sealed with a hash of itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mst
from mst import serial
from mst.conformance.checks import CHECKS
from mst.conformance.findings import FAIL, PASS, Result
from mst.conformance.subject import Subject
from mst.durable import sha256, write_text
from mst.errors import MstError
from mst.registry import GROUP, PluginRecord

FORMAT = "mst-conformance-1"
_VERSIONED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "pluggy")
# A plugin's code and its libraries; a checkpoint or a data set beside them is not the plugin.
_CODE = frozenset({".py", ".pyi", ".so", ".c", ".cc", ".cpp", ".cu", ".h", ".toml"})


def make_report(subject: Subject, results: Sequence[Result]) -> dict[str, Any]:
    """Return the whole report, with its own hash as "sha256"."""
    counts = Counter(result.status for result in results)
    report: dict[str, Any] = {
        "format": FORMAT,
        "backend": subject.name,
        "verdict": PASS if results and not counts[FAIL] else FAIL,
        # A report of some of the checks signs nothing off.
        "complete": len(results) == len(CHECKS),
        "signed_off": len(results) == len(CHECKS) and not counts[FAIL],
        "counts": dict(counts),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mst_version": mst.__version__,
        "versions": _versions(),
        "platform": _platform(),
        "plugin": _plugin(subject.plugin or next(iter(subject.claims), None)),
        "facts": serial.to_json(subject.report) if subject.report else None,
        "environment": dict(subject.environment),
        "checks": [_finite(asdict(result)) for result in results],
    }
    return report | {"sha256": _seal(report)}


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report at once.

    Raises:
        MstError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise MstError(
            f"--output {path} cannot be written: {error.strerror}. Name a file in a directory"
            " that you can write to."
        ) from error


def report_is_whole(path: Path) -> bool:
    """Return whether a report is as the kit wrote it: its hash fits the rest of it.

    Raises:
        MstError: the file is no report.
    """
    report = read_report(path)
    return bool(report["sha256"] == _seal(report))


def read_report(path: Path) -> dict[str, Any]:
    """Return a report.

    Raises:
        MstError: the file cannot be read or is no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MstError(f"{path} is no report: {error}. `mst backend check` writes one.") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT or "sha256" not in report:
        raise MstError(f"{path} is no report of format {FORMAT!r}. `mst backend check` writes one.")
    return report


def default_path(name: str) -> Path:
    """Return where a report goes when the user names no file."""
    return Path(f"mst-conformance-{name}-{datetime.now().astimezone():%Y%m%d}.json")


def _seal(report: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything but the seal, as sorted compact JSON."""
    rest = {key: value for key, value in report.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(value: Any) -> Any:
    """Return the value with numbers that JSON does not have, such as a NaN loss, as text."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _platform() -> str:
    """Return system, kernel release without its builder's suffix, and machine."""
    system = os.uname()
    return f"{system.sysname} {system.release.partition('-')[0]} {system.machine}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plugin(record: PluginRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {
        "entry_point": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "files": dict(sorted(_hashes(record))),
    }


def _hashes(record: PluginRecord) -> Iterator[tuple[str, str]]:
    """Yield each file of the plugin's distribution and of its module, with its SHA-256.

    An editable installation lists no code, so the files beside the module are added.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name != record.name or point.dist is None:
            continue
        if point.dist.name != record.distribution:
            continue
        for file in point.dist.files or ():
            path = Path(str(file.locate()))
            if path.is_file() and path.suffix != ".pyc":
                yield str(file), sha256(path)
        for path, name in _module_files(point.value.partition(":")[0]):
            yield name, sha256(path)


def _module_files(module: str) -> Iterator[tuple[Path, str]]:
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return
    origin = Path(spec.origin)
    if not spec.submodule_search_locations:
        yield origin, origin.name
        return
    for path in sorted(origin.parent.rglob("*")):
        if path.is_file() and path.suffix in _CODE and "__pycache__" not in path.parts:
            yield path, f"{top}/{path.relative_to(origin.parent)}"
