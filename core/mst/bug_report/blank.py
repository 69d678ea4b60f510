"""Takes out of documents and messages what could name a person, a place or a row.

Nothing is kept because it looks harmless. Of a document are kept numbers, and those words that the
program itself has: names of fields, choices of options, dtypes, strategies. Of a message that mst
or a vendor's backend wrote are taken out paths, addresses and names of this machine and its user.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

TEXT = "<text>"
# Of a list no more is of use.
_MOST_ENTRIES = 200
_DEVICE = re.compile(r"(?:cpu|cuda|npu|xpu|mps)(?::[0-9]{1,3})?")
_VERSION = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,5}){1,3}(?:[.+a-z-][a-z0-9.]{0,12})?")
_VERSIONS = ("versions", "mst_version")
# Words that no option lists as its choices: statuses, sources and what a plan says of itself.
_WORDS = frozenset(
    {
        "running", "done", "failed", "interrupted", "killed", "out of memory", "headers", "trace",
        "none", "single", "ddp", "zero1", "zero2", "zero3", "optimizer", "parameters", "roomy",
        "tight", "sdpa", "eager", "flash_attention_2", "bfloat16", "float16", "float32", "nf4",
        "int8", "lora", "qlora", "full", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "gloo",
        "nccl", "hccl", "row", "all-linear", "ok", "warn", "fail", "refused", "backend", "export",
        "objective", "engine",
    }
)  # fmt: skip
# An address with a scheme; an address of mail; numbers of a network.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]{1,12}://[^\s'\"<>]+", re.IGNORECASE)
_MAIL = re.compile(r"[^\s@<>'\"]+@[^\s@<>'\"]+")
_NETWORK = re.compile(
    r"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b|(?<![\w:])[0-9a-f:]*::[0-9a-f:.]*"
    r"|\b(?:[0-9a-f]{1,4}:){3,7}[0-9a-f]{0,4}\b",
    re.IGNORECASE,
)
# A path in quotes may have blanks; one without begins at the root, from home, or here.
_QUOTED = re.compile(r"(?<!\w)(['\"`])([^'\"`]*/[^'\"`]*)\1(?!\w)")
_PATH = re.compile(r"(?<![\w<])(?:~|\.{1,2})?/[^\s'\"`,;:()<>]*")
_RELATIVE = re.compile(r"(?<![\w<./~@+-])[\w.~@+-]+/[^\s'\"`,;:()<>]*")
_FILE = re.compile(
    r"(?<![\w<./])[\w.@+-]+\.(?:jsonl?|csv|tsv|parquet|arrow|txt|xlsx?|gz|zst|xz|bz2|safetensors|gguf|mst"
    r"|ya?ml|toml|pem|pub|key)\b",
    re.IGNORECASE,
)
# Places that are the same on every machine.
_SYSTEM = (
    "/dev/",
    "/proc/",
    "/sys/",
    "/usr/bin/",
    "/usr/lib",
    "/usr/local/Ascend",
    "/usr/local/cuda",
)


def field_names(*kinds: type) -> frozenset[str]:
    """Return the names of all fields of some dataclasses, and of those inside them."""
    names: set[str] = set()
    waiting: list[Any] = list(kinds)
    seen: set[Any] = set()
    while waiting:
        kind = waiting.pop()
        waiting += typing.get_args(kind)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)) or kind in seen:
            continue
        seen.add(kind)
        names |= {each.name for each in dataclasses.fields(kind)}
        waiting += typing.get_type_hints(kind).values()
    return frozenset(names)


def words_of_options() -> frozenset[str]:
    """Return every word that an option of a run can be given, and those of plans and runs."""
    from mst.request import fields

    choices = {word for each in fields().values() for word in each.metadata["choices"]}
    return _WORDS | choices


def blanked(
    value: Any, keys: frozenset[str], words: frozenset[str], is_version: bool = False
) -> Any:
    """Return a document with its numbers and known words; every other text is `TEXT`.

    Args:
        value: as JSON holds it.
        keys: names that may stand before a value; others are numbered.
        words: texts that may stay.
        is_version: so may texts that have the form of a version.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        known = not value or value in words or _DEVICE.fullmatch(value) is not None
        known = known or (is_version and _VERSION.fullmatch(value) is not None)
        return value if known else TEXT
    if isinstance(value, Mapping):
        found = {}
        for number, (key, inner) in enumerate(value.items()):
            name = key if key in keys else f"<name {number}>"
            found[name] = blanked(inner, keys, words, is_version or key in _VERSIONS)
        return found
    if isinstance(value, Sequence):
        some = [blanked(each, keys, words, is_version) for each in value[:_MOST_ENTRIES]]
        return some + ([f"<{len(value) - len(some)} more>"] if len(value) > len(some) else [])
    return TEXT


def names_here(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of this machine and its user, the longest first."""
    import getpass

    found = {os.uname().nodename, os.uname().nodename.partition(".")[0]}
    found |= {environ.get(each, "") for each in ("USER", "LOGNAME", "HOSTNAME", "SUDO_USER")}
    with suppress(OSError, KeyError):  # a user without an entry has no name to take out
        found.add(getpass.getuser())
    # `root` and the like are words of many messages, and name nobody.
    kept = found - {"", "root", "user", "localhost"}
    return tuple(sorted((each for each in kept if len(each) > 1), key=len, reverse=True))


def without_names(text: str, names: Iterable[str]) -> str:
    """Return a message without paths, files, addresses and the given names; of one line."""
    found = "".join(each for each in " ".join(text.split()) if each.isprintable())
    found = _ADDRESS.sub("<address>", found)
    found = _MAIL.sub("<address>", found)
    found = _QUOTED.sub(lambda match: f"{match[1]}{_path(match[2])}{match[1]}", found)
    found = _PATH.sub(lambda match: _path(match[0]), found)
    found = _RELATIVE.sub(lambda match: _relative(match[0]), found)
    found = _FILE.sub("<file>", found)
    found = _NETWORK.sub("<address>", found)
    return named_nothing(found, names)


def named_nothing(text: str, names: Iterable[str]) -> str:
    """Return a text with the given names replaced, a host's with the domain behind it."""
    for each in names:
        name = rf"(?<!\w){re.escape(each)}(?:\.[\w-]+)*(?!\w)"
        text = re.sub(name, "<name>", text, flags=re.IGNORECASE)
    return text


def _path(path: str) -> str:
    plain = path.startswith(_SYSTEM) and ".." not in path and " " not in path
    return path if plain or path == "/" else "<path>"


def _relative(path: str) -> str:
    # A rate, such as GB/s, is none.
    return path if path.endswith("/s") else "<path>"
