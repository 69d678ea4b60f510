"""`mst.train`: a training job from Python, as `mst train` does it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mst import rundir
from mst.attempts import run_to_end
from mst.errors import EXIT_FAILED, MstError
from mst.inputs import with_defaults
from mst.job import begin, prepare_job
from mst.request import TrainRequest, fields
from mst.resume import resume
from mst.rundir import RunManifest
from mst.seal.audit import open_log


def train(
    *,
    environ: Mapping[str, str] | None = None,
    audit_log: str | Path | None = None,
    **options: Any,
) -> tuple[Path, RunManifest]:
    """Train as `mst train` does, from Python; return the run directory and its manifest.

    The workers run in the jail; the program that calls this does not, nor do plugins in it.

    Args:
        environ: the environment; default the process's own.
        audit_log: directory of the audit log; default as the settings say.
        options: the fields of `mst.request.TrainRequest`, in Python's types; single paths may
            stand for lists of one.

    Raises:
        MstError: whatever stands in the way, or the run failed.
    """
    from mst.cli.options import convert
    from mst.seal.audit.arguments import given_fields

    unknown = [each for each in options if each not in fields()]
    if unknown:
        raise MstError(f"mst.train takes no option {unknown[0]!r}; see mst.request.TrainRequest.")
    values = {name: convert(name, each, name) for name, each in options.items() if each is not None}
    given = frozenset(values)
    environment = os.environ if environ is None else environ
    directory = None if audit_log is None else Path(audit_log).expanduser().absolute()
    with open_log(directory, "train", api="mst.train", options=given_fields(values)) as command:
        code, path = _train(TrainRequest(**values), given, environment)
        if command is not None:
            command.code = code
    manifest = rundir.read_manifest(path)
    if code:
        error = MstError(manifest.error or f"the run in {path} failed")
        error.exit_code = code or EXIT_FAILED
        raise error
    return path, manifest


def _train(
    request: TrainRequest, given: frozenset[str], environ: Mapping[str, str]
) -> tuple[int, Path]:
    from mst.seal.jail.command import of_request, outputs_of
    from mst.seal.jail.holder import asking
    from mst.seal.jail.seal import Scene, check

    request = with_defaults(request, given)
    scene = Scene(outputs=outputs_of(request))
    check(of_request(request), scene)
    with asking(of_request(request), scene):
        if request.resume is not None:
            path, lock, job = resume(request, given, environ)
        else:
            job = prepare_job(request, environ)
            path, lock = begin(job)
        with lock:
            return run_to_end(path, job, lock, environ), path
