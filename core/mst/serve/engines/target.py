"""What is to be served, as engines are chosen by it: format and architecture, from its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mst import rundir
from mst.chat import run_of
from mst.data.special import read_json
from mst.model.locate import locate
from mst.plan import Plan
from mst.request import TrainRequest
from mst.runs import RUNS
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.serve.engines import ModelToServe
from mst.training.sealed_directory import MANIFEST
from mst.tuned import of_run


def model_to_serve(
    target: str | None, which: str | None, environ: Mapping[str, str], keys: KeyRing = NO_KEYS
) -> tuple[str, ModelToServe]:
    """Return a name to show, and the facts that an engine is chosen by.

    Args:
        target: as `mst.chat.choose_model` takes it.
        which: a checkpoint of the run.
        environ: the process's environment.
        keys: the user's, for an encrypted run.

    Raises:
        MstError: there is nothing of the kind, or it is not whole.
    """
    run = run_of(target)
    if run is not None:
        name = run.resolve().name
        request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
        plan = rundir.read_document(Plan, run, rundir.PLAN)
        if request.encrypt_run or plan.tuner != "full":
            # What opens it is asked for once, by the engine that reads it.
            return name, ModelToServe(str(run.absolute()), "run")
        tuned = of_run(run, which, keys)
        return name, _of_directory(Path(tuned.weights), tuned.template)
    source = locate(target, (), environ, RUNS)
    if source.is_gguf:
        return source.name, ModelToServe(str(source.path.absolute()), "gguf")
    return source.name, _of_directory(source.path.absolute())


def _of_directory(directory: Path, template: str | None = None) -> ModelToServe:
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    layout = "merged"
    if isinstance(quantization, dict):
        layout = str(quantization.get("quant_method") or "quantized in a way that is not named")
    named = config.get("architectures")
    manifest = read_json(directory / MANIFEST)
    exported = manifest.get("format") if "status" in manifest else None
    return ModelToServe(
        str(directory),
        layout,
        str(named[0]) if isinstance(named, list) and named else "",
        str(exported) if isinstance(exported, str) else "",
        template,
    )
