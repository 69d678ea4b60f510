"""Bytes of a number, and amounts in words: bytes and seconds as a person reads them."""

from __future__ import annotations

import re

from mst.errors import UsageError

# Bytes of a weight, by torch's name of its dtype.
FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

# A letter alone is binary, as for Docker, Slurm's --mem and GNU's tools.
_UNITS = {
    "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([MGT](?:I?B)?)", re.IGNORECASE)


def gib(count: float) -> str:
    """Return bytes as GiB, or as MiB when it is less than one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def size_bytes(text: str, shown: str) -> int:
    """Return how many bytes a size is: "20GB" is 20 * 10^9, "20GiB" or "20G" 20 * 2^30.

    Args:
        text: a number above 0 with MB, GB, TB, MiB, GiB, TiB, M, G or T, in any case.
        shown: how the user spelt the option.

    Raises:
        UsageError: it is no such size.
    """
    found = _SIZE.fullmatch(text.strip())
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not count:
        raise UsageError(
            f"{shown} takes a size with its unit, such as 512MB, 20GB (of 10^9 bytes) or 20GiB (of"
            f" 2^30, as is 20G); found {text!r}."
        )
    return count


def duration(seconds: float) -> str:
    """Return seconds in the unit that a person would use."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"
