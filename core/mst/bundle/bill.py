"""The bill of materials of a bundle: every wheel and model in it, as CycloneDX 1.6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from email.message import Message
from typing import Any

import mst
from mst.seal.supply.bill import document
from mst.seal.supply.packages import package_component


def bill_text(
    wheels: Mapping[str, Message], models: Sequence[str], hashes: Mapping[str, str]
) -> str:
    """Return the bill as JSON.

    Args:
        wheels: the metadata of each wheel, by its path in the bundle.
        models: the directory of each in the bundle.
        hashes: SHA-256 of every file, by its path in the bundle.
    """
    from packaging.utils import canonicalize_name

    packages = []
    for path, metadata in wheels.items():
        name = canonicalize_name(str(metadata["Name"]))
        each = package_component(name, str(metadata["Version"]), metadata)
        packages.append(each | {"hashes": _hash(hashes[path])})
    weights = [_model(path, hashes) for path in models]
    own = next(each for each in packages if each["name"] == "mst-train")
    others = [each for each in packages if each is not own]
    return document(
        {"type": "application", "name": "mst-train", "version": mst.__version__},
        own | {"type": "application"},
        [*others, *weights],
        [{"ref": own["bom-ref"], "dependsOn": [each["bom-ref"] for each in others]}],
    )


def _model(path: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": path,
        "name": path.rpartition("/")[2],
        "components": [
            {"type": "file", "name": name.removeprefix(f"{path}/"), "hashes": _hash(digest)}
            for name, digest in hashes.items()
            if name.startswith(f"{path}/")
        ],
    }


def _hash(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]
