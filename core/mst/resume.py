"""Going on with a run: what it may change, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from mst import rundir
from mst.data.rows import fingerprint
from mst.errors import RunError
from mst.job import Job, prepare_job, write_documents
from mst.plan import Plan
from mst.request import TrainRequest
from mst.rundir import RunManifest

# What a resumed run may change: its cadence, its end, and the devices, of which one may have died,
# with how the job is cut over them, and where activations lie: the global batch stays. A new end
# moves the rest of a cosine or linear schedule; everything else that shapes a step stays.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "output_dir", "resume", "models_dir", "logging_steps", "eval_steps", "save_steps",
        "save_total_limit", "early_stopping_patience", "load_best_model_at_end",
        "max_steps", "num_train_epochs", "device", "on_oom", "nproc_per_node", "nnodes",
        "node_rank", "master_addr", "master_port", "deepspeed", "offload_dir",
        "memory_budget", "activation_offloading", "jail", "jail_reason", "allow_net", "key_file",
        "passphrase_file", "pkcs11",
    }
)  # fmt: skip


def resumed_request(request: TrainRequest, given: frozenset[str]) -> tuple[Path, TrainRequest]:
    """Return the directory of the run to continue, and its request with what may change changed.

    Args:
        request: what the user asked now; `resume` is "last" or a path.
        given: options that the user spelt out.

    Raises:
        RunError: no run there, it is done, or an option would change what the run is.
    """
    path = Path(request.output_dir) if request.output_dir else None
    resume = "last"
    if request.resume not in (None, "last"):
        named = Path(str(request.resume)).absolute()
        path = _run_of(named)
        resume = str(named) if named != path else "last"
    if path is None:
        raise RunError(
            "--resume needs to know which run: pass --output-dir RUN with it, or --resume RUN."
            " `mst runs list` shows the runs here."
        )
    path = path.absolute()
    stored = rundir.read_document(TrainRequest, path, rundir.REQUEST)
    plan = rundir.read_document(Plan, path, rundir.PLAN)
    # A run from before there was such an option goes on as it began, to the bit.
    if not plan.prefix_sharing:
        stored = replace(stored, prefix_sharing="off")
    if not plan.block_attention:
        stored = replace(stored, block_attention="off")
    before, after = asdict(stored), asdict(request)
    changed = sorted(
        name
        for name in given - CHANGEABLE_ON_RESUME
        if before[name] != after[name] and not _same_paths(before[name], after[name])
    )
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise RunError(
            f"{path} was started with other values of {flags}. A resumed run keeps what shapes its"
            " steps: leave these options out, or start a new run in another --output-dir."
        )
    changes: dict[str, Any] = {name: after[name] for name in given & CHANGEABLE_ON_RESUME}
    changed_request = replace(stored, **(changes | {"resume": resume, "output_dir": str(path)}))
    return path, _same_global_batch(stored, changed_request)


def _same_global_batch(stored: TrainRequest, request: TrainRequest) -> TrainRequest:
    """Return the request with its global batch cut over its devices as they are now.

    Raises:
        RunError: it can't be cut into as many parts.
    """
    before = (stored.nproc_per_node or 1) * stored.nnodes
    world = (request.nproc_per_node or 1) * request.nnodes
    micro, accumulation = stored.per_device_train_batch_size, stored.gradient_accumulation_steps
    if world == before or micro is None or accumulation is None:
        return request
    rows = micro * accumulation * before
    if rows % world:
        raise RunError(
            f"{request.output_dir} takes {rows} rows a step, which {world} devices can't share"
            f" evenly. Pass --nproc-per-node so that the number of devices divides {rows}."
        )
    share = rows // world
    size = max(each for each in range(1, min(micro, share) + 1) if share % each == 0)
    return replace(
        request, per_device_train_batch_size=size, gradient_accumulation_steps=share // size
    )


def _same_paths(before: object, after: object) -> bool:
    def plain(value: object) -> object:
        if isinstance(value, (tuple, list)):
            return [plain(each) for each in value]
        return str(Path(value).absolute()) if isinstance(value, str) else value

    return plain(before) == plain(after)


def _run_of(path: Path) -> Path:
    # A checkpoint's path names its run: RUN/checkpoints/step-N.
    return path.parent.parent if path.parent.name == rundir.CHECKPOINTS else path


def resume(
    request: TrainRequest,
    given: frozenset[str],
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Path, IO[str], Job]:
    """Claim an unfinished run and plan the rest of it.

    Raises:
        RunError: it is done, in use, or its model or data have changed since it began.
    """
    path, request = resumed_request(request, given)
    lock = rundir.take_lock(path)
    try:
        return path, lock, _rest_of(path, request, environ, tell)
    except BaseException:
        lock.close()
        raise


def _rest_of(
    path: Path, request: TrainRequest, environ: Mapping[str, str], tell: Callable[[str], None]
) -> Job:
    """Plan what is left of the run at `path`, whose lock is held, and write it there."""
    manifest = rundir.read_manifest(path)
    if manifest.status == "done":
        raise RunError(
            f"{path} is done: there is nothing to resume. `mst runs show {path}` shows it; start a"
            " new run in another --output-dir."
        )
    job = prepare_job(request, environ, tell)
    for what, before, after in (
        ("model", manifest.model_sha256, job.manifest.model_sha256),
        ("data", _hashes(manifest), _hashes(job.manifest)),
    ):
        if before != after:
            raise RunError(
                f"the {what} of {path} has changed since the run began, so it can't be continued"
                " exactly. Put it back as it was, or start a new run in another --output-dir."
            )
    if job.plan.privacy != manifest.privacy:
        raise RunError(
            f"{path} has differential privacy for {_steps(manifest)}, planned when it began; with"
            " other steps, units or libraries its ε would not hold. Leave --max-steps and"
            " --num-train-epochs out, or start a new run in another --output-dir."
        )
    kept = replace(manifest, status="running", finished=None, error=None)
    job = replace(job, manifest=kept)
    write_documents(path, job)
    return job


def _steps(manifest: RunManifest) -> str:
    planned = manifest.privacy
    return f"{planned.steps} steps" if planned else "none of its steps"


def _hashes(manifest: RunManifest) -> list[tuple[str, str]]:
    return [fingerprint(each) for each in (*manifest.data, *manifest.val_data)]
