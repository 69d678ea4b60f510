"""The versions of all parts, from their metadata: no part is imported."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import mst

# What shapes a run's numbers, or its files. One that is not installed is left out.
PARTS = (
    "torch", "torch-npu", "transformers", "peft", "tokenizers", "safetensors", "huggingface-hub",
    "bitsandbytes", "deepspeed", "opacus", "gptqmodel", "gguf", "vllm", "lmdeploy", "pyarrow",
    "pydantic", "uvicorn", "llguidance", "cryptography", "model-signing", "modelscope-hub",
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Versions:
    """What is installed here.

    Attributes:
        mst: of this program.
        commit: of the checkout that it runs from, or that it was installed from; "" when unknown.
        python: of the interpreter, with its kind where that isn't CPython.
        platform: the system's kernel, and the machine's architecture.
        packages: of `PARTS`, those that are installed.
        plugins: entry points of mst by name, with the package and version that each is of.
    """

    mst: str
    commit: str
    python: str
    platform: str
    packages: Mapping[str, str] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)


def versions() -> Versions:
    """Return the versions of everything that mst consists of here."""
    kind = platform.python_implementation()
    python = platform.python_version() + ("" if kind == "CPython" else f" ({kind})")
    system = platform.uname()
    return Versions(
        mst=mst.__version__,
        commit=commit(),
        python=python,
        platform=f"{system.system} {system.release} {system.machine}",
        packages={name: found for name in PARTS if (found := _version(name))},
        plugins=_plugins(),
    )


def commit() -> str:
    """Return the commit of this program, "" where nobody can say.

    From git's own files where it runs from a checkout, else from what pip recorded of an address of
    git's.
    """
    folder = Path(mst.__file__).resolve().parents[2]
    with suppress(OSError, ValueError):
        return _head(folder / ".git")
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        text = importlib.metadata.distribution("mst-train").read_text("direct_url.json")
        found = str(json.loads(text or "{}")["vcs_info"]["commit_id"])
        if _COMMIT.fullmatch(found):
            return found
    return ""


def lines(found: Versions) -> list[str]:
    """Return the versions as lines of text; the first is `mst X` alone, for programs."""
    table = {"commit": found.commit} if found.commit else {}
    table |= {"python": found.python, "platform": found.platform, **found.packages}
    own = [name for name, of in found.plugins.items() if of.startswith("mst-train ")]
    table["plugins"] = ", ".join(own) or "none"
    others = {f"plugin {name}": of for name, of in found.plugins.items() if name not in own}
    width = max(map(len, (*table, *others)))
    text = [f"{name:<{width}}  {value}" for name, value in (table | others).items()]
    return [f"mst {found.mst}", *text]


def _version(name: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name) or ""
    return ""


def _plugins() -> dict[str, str]:
    found = {}
    for each in importlib.metadata.entry_points(group="mst"):
        of = each.dist
        found[each.name] = "unknown" if of is None else f"{of.name} {of.version}"
    return dict(sorted(found.items()))


def _head(git: Path) -> str:
    """Return the commit that HEAD names.

    Source: gitrepository-layout(5): HEAD, refs, packed-refs, and worktrees' gitdir files.

    Raises:
        OSError: there is no such repository.
        ValueError: its files are of another form.
    """
    if git.is_file():  # of a worktree: it names the directory
        git = git.parent / _text(git).removeprefix("gitdir:").strip()
    head = _text(git / "HEAD")
    if _COMMIT.fullmatch(head):
        return head
    name = head.removeprefix("ref:").strip()
    shared = git
    if (git / "commondir").is_file():
        shared = git / _text(git / "commondir")
    for place in (git, shared):
        with suppress(OSError):
            if _COMMIT.fullmatch(found := _text(place / name)):
                return found
    for line in _text(shared / "packed-refs").splitlines():
        found, _, of = line.partition(" ")
        if of == name and _COMMIT.fullmatch(found):
            return found
    raise ValueError("HEAD names no commit")


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8").strip()
