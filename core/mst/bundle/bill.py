"""The bill of materials of a bundle: every wheel and model in it, as CycloneDX 1.6."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from email.message import Message
from typing import Any

import mst
from mst.rundir import now
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
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": now(),
            "tools": {
                "components": [
                    {"type": "application", "name": "mst-train", "version": mst.__version__}
                ]
            },
            "component": own | {"type": "application"},
        },
        "components": [*others, *weights],
        "dependencies": [{"ref": own["bom-ref"], "dependsOn": [e["bom-ref"] for e in others]}],
    }
    return json.dumps(bill, indent=2, ensure_ascii=False) + "\n"


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
