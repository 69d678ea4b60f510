"""GGUF files by llama.cpp's own converter and quantizer, in a process of their own."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mst import serial
from mst.errors import EXIT_INTERRUPTED, Interrupted, MstError, PlanError
from mst.launch import how_it_ended, run_worker, worker_environment

# Beside mst's own environment: what lies there shadows its `gguf`.
PACKAGES_DIR = Path(sys.prefix) / "share" / "mst" / "gguf"
REQUIREMENTS = Path(__file__).with_name("gguf-requirements.txt")


@dataclass(frozen=True)
class GgufJob:
    """What the worker does; all paths are absolute.

    Attributes:
        source: model directory.
        file: to be written.
        work_dir: for the file that is quantized.
        kind: of the numbers: one of `mst_plugins.gguf_worker.FILE_TYPES`.
        threads: CPU threads.
        agreement: share of positions at which llama.cpp must find the model's likeliest token.
        report: file descriptor that the checks' results are written to, as JSON.
    """

    source: str
    file: str
    work_dir: str
    kind: str
    threads: int
    agreement: float
    report: int


@dataclass(frozen=True)
class GgufReport:
    """What the worker found.

    Attributes:
        versions: of the packages that it used.
        checked: what, to the result in words.
    """

    versions: Mapping[str, str]
    checked: Mapping[str, str]


def pinned() -> dict[str, str]:
    """Return the packages of `REQUIREMENTS`, name to version."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name: version for name, version in pairs}


def check(packages: Path = PACKAGES_DIR) -> None:
    """Make sure, before any work, that converter and quantizer are there in the right versions.

    Raises:
        PlanError: they are not; says the command that puts them there.
    """
    there = {
        each.metadata["Name"]: each.version
        for each in importlib.metadata.distributions(path=[str(packages)])
    }
    wrong = {
        f"{name} {version} (found: {there.get(name, 'none')})"
        for name, version in pinned().items()
        if there.get(name) != version
    }
    if wrong:
        raise PlanError(
            f"--format gguf needs {', '.join(sorted(wrong))} in {packages}. Put them there:\n"
            f"  {sys.executable} -m pip install --no-deps --upgrade --target {packages}"
            f" -r {REQUIREMENTS}"
        )


def write(
    source: Path,
    file: Path,
    work_dir: Path,
    kind: str,
    threads: int,
    agreement: float,
    environ: Mapping[str, str],
) -> GgufReport:
    """Write a model directory as a GGUF file, have llama.cpp load it, and return what was checked.

    Args:
        source: model directory.
        file: to be written.
        work_dir: of this call alone; must exist.
        kind: of the numbers.
        threads: CPU threads.
        agreement: as in `GgufJob`.
        environ: the process's environment.

    Raises:
        Interrupted: the user stopped it.
        MstError: the worker failed, and has said why on standard error.
    """
    result = os.memfd_create("report")
    with os.fdopen(result, "r", encoding="utf-8") as report:
        job = GgufJob(
            source=str(source.absolute()),
            file=str(file.absolute()),
            work_dir=str(work_dir.absolute()),
            kind=kind,
            threads=threads,
            agreement=agreement,
            report=result,
        )
        before = environ.get("PYTHONPATH")
        path = os.pathsep.join([str(PACKAGES_DIR), *([before] if before else [])])
        code = run_worker(
            "mst_plugins.gguf_worker",
            [serial.dumps(job)],
            worker_environment(environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}),
            keep_open=(result,),
        )
        if code == EXIT_INTERRUPTED:
            raise Interrupted(f"{source} was not written as GGUF. Run the same command again.")
        if code:
            cause = how_it_ended(code, "Run the same command again, with more memory free")
            raise MstError(f"{source} was not written as GGUF: {cause}.")
        report.seek(0)
        return serial.loads(GgufReport, report.read())
