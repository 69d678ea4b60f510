"""The model that a request names: found here, verified, converted where it is a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mst.cache import cache_dir
from mst.model.locate import ModelSource, locate
from mst.request import TrainRequest
from mst.seal.supply.before_use import verify_before_use
from mst.seal.supply.signature import ModelSignature


@dataclass(frozen=True)
class NamedModel:
    """A model that can be read.

    Attributes:
        source: where it was found.
        directory: holds it; of a GGUF file, the converted copy.
        signature: what was verified; None when no signature was given.
    """

    source: ModelSource
    directory: Path
    signature: ModelSignature | None


def named_model(
    request: TrainRequest,
    environ: Mapping[str, str],
    tell: Callable[[str], None] = lambda line: None,
    runs: Path | None = None,
) -> NamedModel:
    """Return the model that a request names.

    Args:
        request: its model, signature, and where models are looked for.
        environ: the process's environment.
        tell: shown to the user before each part that takes long.
        runs: as `mst.model.locate.locate` takes it.

    Raises:
        ModelError: it isn't found, can't be converted, or isn't what was signed.
    """
    source = locate(request.model, request.models_dir, environ, runs)
    signature = verify_before_use(
        source.path, request.model_signature, request.model_public_key, tell
    )
    directory = source.path
    if source.is_gguf:
        from mst.model.gguf import convert

        directory = convert(source.path, cache_dir(), tell)
    return NamedModel(source, directory, signature)
