"""The Python packages that are installed here: name, version and licence, as components."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any
from urllib.parse import quote

_OSI = "License :: OSI Approved :: "
# Some packages put the licence's whole text where its name belongs.
_LONGEST_NAME = 80


def package_components() -> list[dict[str, Any]]:
    """Return each installed distribution once, as a CycloneDX component, by name."""
    found: dict[str, dict[str, Any]] = {}
    for each in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower()
        # Of two copies on the path, the first is the one that is imported.
        if name and name not in found:
            found[name] = package_component(name, each.version or "0", each.metadata)
    return [found[name] for name in sorted(found)]


def package_component(name: str, version: str, metadata: Any) -> dict[str, Any]:
    """Return a distribution as a CycloneDX component.

    Args:
        name: normalized.
        version: of it.
        metadata: its headers, as a mapping of `email.message.Message`.
    """
    # Package URL specification, type "pypi".
    purl = f"pkg:pypi/{name}@{quote(version, safe='')}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    licences = _licences(metadata)
    return component | ({"licenses": licences} if licences else {})


def _licences(metadata: Any) -> list[dict[str, Any]]:
    """Return what a package's metadata says of its licence; [] when it says nothing short."""
    expression = metadata.get("License-Expression")
    if expression:
        return [{"expression": str(expression)}]
    named = [
        each.removeprefix(_OSI)
        for each in metadata.get_all("Classifier") or ()
        if each.startswith(_OSI)
    ]
    text = str(metadata.get("License") or "").strip()
    if not named and 0 < len(text) <= _LONGEST_NAME and "\n" not in text:
        named = [text]
    return [{"license": {"name": each}} for each in sorted(set(named))]
