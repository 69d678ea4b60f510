"""Texts that must turn up nowhere, and the search for them in whatever form."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

# At both ends of each canary, so that one that was cut is found too. No program has it, and it is
# ASCII, so JSON's and Python's escapes leave it as it is.
STEM = "zqxvkw"
_MIDDLE = "密码 Müller"


def canaries() -> Iterator[str]:
    """Yield canaries without end, each its own; every other one could be a name or a word."""
    number = 0
    while True:
        number += 1
        yield f"{STEM}{number:05}" + (f"{_MIDDLE}{STEM}" if number % 2 else "")


def _in_base64(text: bytes) -> set[bytes]:
    """Return what stands in base64 of anything that holds the text, at each of three places."""
    found = set()
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + text).rstrip(b"=")
        # Characters that mix with what stands before and behind say nothing.
        found.add(coded[(0, 2, 3)[shift] : -1])
    return found


_NEEDLES = {
    STEM.encode(),
    STEM.upper().encode(),
    STEM.encode("utf-16-le"),
    STEM.encode("utf-16-be"),
    STEM.encode().hex().encode(),
    STEM[::-1].encode(),
    " ".join(STEM).encode(),
    # The words between the stems: raw, and as JSON, Python and URLs write them.
    *(word.encode() for word in ("密码", "\\u5bc6\\u7801", "\\xe5\\xaf\\x86", "%E5%AF%86")),
    "密码".encode("gb18030"),
    *_in_base64(STEM.encode()),
}
# As a program would print the numbers of its bytes or characters.
_NEEDLES.add(", ".join(map(str, STEM.encode())).encode())


def leaks(content: bytes) -> list[bytes]:
    """Return in which forms a canary stands in some bytes."""
    return [needle for needle in _NEEDLES if needle in content]


def leaks_in(folders: Iterable[Path], kept: Iterable[Path] = ()) -> list[str]:
    """Return which files below some folders hold a canary, or have one for a name.

    Args:
        folders: searched with all that is below them.
        kept: the data itself, which is passed over.
    """
    passed, found = set(kept), []
    for folder in folders:
        for path in folder.rglob("*"):
            if path in passed:
                continue
            if leaks(str(path).encode()) or (path.is_file() and leaks(_unpacked(path))):
                found.append(str(path))
    return found


def _unpacked(path: Path) -> bytes:
    """Return a file's bytes, and those of its members where it is an archive."""
    import gzip
    import zipfile

    content = path.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content += b"".join(map(archive.read, archive.namelist()))
    if content[:2] == b"\x1f\x8b":
        content += gzip.decompress(content)
    return content
