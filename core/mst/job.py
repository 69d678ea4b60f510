"""A training job from the request to its run directory: gather, plan, claim, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO

from mst import rundir
from mst.configuration import ZERO_STAGES
from mst.explicit import as_explicit
from mst.facts import MachineFacts
from mst.inputs import gather
from mst.model.facts import ModelFacts
from mst.model.locate import ModelSource
from mst.plan import Plan
from mst.planner import plan as make_plan
from mst.request import TrainRequest
from mst.rundir import RunManifest
from mst.seal.jail.holder import known
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.seal.keys.run_key import make_run_key
from mst.seats import Seats
from mst.workload import DataFacts


@dataclass(frozen=True)
class Job:
    """A planned job: everything that is written into its run directory.

    `seats` is where the other machines' commands are met, when they share the job. `keys` opened
    the data and open an encrypted run; they are written nowhere.
    """

    request: TrainRequest
    machine: MachineFacts
    source: ModelSource
    model: ModelFacts
    data: DataFacts
    plan: Plan
    manifest: RunManifest
    seats: Seats | None = None
    keys: KeyRing = field(default=NO_KEYS, repr=False)


def prepare_job(
    request: TrainRequest,
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
    on: str | None = None,
) -> Job:
    """Gather what a plan is made from, and plan; arguments are those of `mst.inputs.gather`.

    Raises:
        MstError: whatever stands in the way.
    """
    from mst.privacy.budget import with_budget

    found = gather(request, environ, tell, on)
    where, data = found.where, found.data
    made = make_plan(
        where.backend,
        where.devices,
        where.capabilities,
        where.environment,
        found.model,
        data,
        request,
        where.host_bytes,
        found.zero,
    )
    if request.dp_epsilon is not None:
        tell("finding the noise for --dp-epsilon")
        made = with_budget(made, request, data.units)
    if ZERO_STAGES[made.strategy]:
        # A file that contradicts the plan is told of now, before anything is claimed or loaded.
        from mst.training.deepspeed_config import config_of

        config_of(made, request)
    return Job(
        request=_anywhere(request, found.source),
        machine=found.machine,
        source=found.source,
        model=found.model,
        data=data,
        plan=made,
        manifest=replace(found.manifest, privacy=made.privacy),
        keys=found.keys,
    )


def _anywhere(request: TrainRequest, source: ModelSource) -> TrainRequest:
    """Return the request with paths that mean the same from every working directory."""
    from mst.data.sources import absolute_spec
    from mst.training.rewards import absolute_specs

    info = request.dataset_info
    return replace(
        request,
        model=str(source.path.absolute()),
        model_signature=_absolute(request.model_signature),
        model_public_key=_absolute(request.model_public_key),
        dataset=tuple(absolute_spec(each, info) for each in request.dataset),
        val_dataset=tuple(absolute_spec(each, info) for each in request.val_dataset),
        reward_funcs=absolute_specs(request.reward_funcs),
        dataset_info=_absolute(info),
        # Keys are named anew by each command: a run directory tells nobody where they lie.
        key_file=None,
        passphrase_file=None,
        pkcs11=None,
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def default_output_dir(source: ModelSource) -> Path:
    """Return a new directory's name under ./runs: the local time and the model."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{source.name.split('/')[-1]}"
    return next(
        path
        for path in (
            Path("runs") / f"{name}{suffix}" for suffix in ("", *map("-{}".format, range(2, 100)))
        )
        if not path.exists()
    )


def begin(job: Job) -> tuple[Path, IO[str]]:
    """Claim the run directory and write the job into it; return it with its lock, held.

    Raises:
        RunError: the directory holds another run, is in use, or can't be written.
        EncryptionError: the key of an encrypted run can't be written.
    """
    path = Path(job.request.output_dir or default_output_dir(job.source)).absolute()
    lock = rundir.claim_new(path)
    if job.request.encrypt_run:
        make_run_key(path, job.keys)
    write_documents(path, job)
    return path, lock


def write_documents(path: Path, job: Job) -> None:
    """Write a job into its run directory, whose lock is held."""
    # The manifest comes last: a directory without it is no run.
    rundir.write_document(path, rundir.FACTS, job.machine)
    explicit = as_explicit(job.request, job.plan)
    rundir.write_document(path, rundir.REQUEST, replace(explicit, output_dir=str(path)))
    rundir.write_document(path, rundir.PLAN, job.plan)
    seal = known()
    if seal is not None:
        rundir.write_document(path, rundir.SEAL, seal)
    rundir.write_document(path, rundir.MANIFEST, job.manifest)
