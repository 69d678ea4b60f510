"""What is to be served, as engines are chosen by it: format and architecture, from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mst.chat import run_of
from mst.data.special import read_json
from mst.model.locate import locate
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.serve.engines import ModelToServe
from mst.training.checkpoint import MANIFEST
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
        tuned = of_run(run, which, keys)
        model = _of_directory(Path(tuned.weights), tuned.template)
        if tuned.adapter is not None or tuned.encrypted_run is not None:
            model = replace(model, format="run", exported_as="")
        return run.resolve().name, model
    source = locate(target, (), environ)
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
