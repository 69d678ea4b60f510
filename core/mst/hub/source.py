"""What is pulled, from which host, and what of a repository is a model's."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from mst.errors import ModelError, UsageError
from mst.loopback import is_loopback
from mst.seal.supply.model_files import PICKLES

HUGGING_FACE, MODELSCOPE = "huggingface", "modelscope"
HUBS = (HUGGING_FACE, MODELSCOPE)
ENDPOINTS = {
    HUGGING_FACE: "https://huggingface.co",
    MODELSCOPE: "https://www.modelscope.cn",
}
# Everything a model is read from, its card and its licence. No pickle, no code.
_WANTED = (
    "*.safetensors", "*.json", "*.jinja", "*.tiktoken", "*.model", "merges.txt", "vocab.txt",
    "README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub lists it.

    Attributes:
        name: its path there.
        bytes: its size.
        sha256: of its content; "" where the hub doesn't say, as of small files.
        git_sha1: git's hash of its blob; "" where the hub doesn't say.
    """

    name: str
    bytes: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Listing:
    """A repository at one revision.

    Attributes:
        revision: the commit's hash, or the hub's name of it.
        files: all of them.
        licence: as the hub has it; "" when it doesn't say.
    """

    revision: str
    files: tuple[HubFile, ...]
    licence: str = ""


class HubRefused(Exception):
    """The hub answered, and not with what was asked for."""

    def __init__(self, status: int) -> None:
        """Keep the status of its answer."""
        super().__init__(str(status))
        self.status = status


def endpoint_of(hub: str, given: str | None) -> tuple[str, str]:
    """Return a hub's address, and the host in it.

    Args:
        hub: of `HUBS`.
        given: what `--endpoint` says.

    Raises:
        UsageError: it is no address that a model can be trusted to come from.
    """
    endpoint = (given or ENDPOINTS[hub]).rstrip("/")
    try:
        parts = urlsplit(endpoint)
        host, plain = parts.hostname or "", parts.scheme == "http"
        valid = host and parts.port != 0 and parts.scheme in ("http", "https")
    except ValueError:
        valid = False
    # A password may stand there, so the value is not repeated.
    if not valid or parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "--endpoint takes the address of a hub, such as https://hf.example.org, without a name,"
            " a password or a query."
        )
    if plain and not is_loopback(host):
        raise UsageError(
            f"--endpoint {endpoint} is not encrypted, so anybody on the way could change the model"
            f" and the hashes it is checked with. Give https://{parts.netloc}{parts.path}."
        )
    return endpoint, host.lower()


def wanted(files: Sequence[HubFile], repository: str) -> tuple[HubFile, ...]:
    """Return the files of a repository that make a model.

    Raises:
        ModelError: its weights are not there as safetensors, or a file's name is no plain one or
            is there twice.
    """
    found = tuple(
        each
        for each in files
        if "/" not in each.name and any(fnmatch(each.name, one) for one in _WANTED)
    )
    names = {each.name for each in found}
    if wrong := next((each for each in names if not _is_plain(each)), None):
        raise ModelError(f"{repository} has a file with the name {wrong!a}. Don't use it.")
    if len(names) < len(found):
        raise ModelError(f"{repository} lists a file twice. Don't use it.")
    if "config.json" in names and any(each.endswith(".safetensors") for each in names):
        return found
    pickled = [each.name for each in files if PurePosixPath(each.name).suffix.lower() in PICKLES]
    if "config.json" not in names:
        raise ModelError(
            f"{repository} is no model that mst can tune: it has no config.json"
            f" ({len(files)} files). GGUF and adapter repositories have none; name the model that"
            " they were made from."
        )
    why = f"only as pickles ({pickled[0]!a}), which can run code" if pickled else "in none"
    raise ModelError(
        f"{repository} has its weights {why}; mst fetches *.safetensors alone. Look for a revision"
        " that has them (--revision), or for another copy of the model."
    )


def _is_plain(name: str) -> bool:
    return name.isprintable() and name == os.path.basename(name) and not name.startswith(".")


def left_out(files: Sequence[HubFile], taken: Sequence[HubFile]) -> tuple[str, ...]:
    """Return the names of what is not fetched."""
    names = {each.name for each in taken}
    return tuple(sorted(each.name for each in files if each.name not in names))
