"""Hashes of a directory's files, in the form of `sha256sum`, and whether they still hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mst.durable import sha256
from mst.errors import ModelError
from mst.seal.supply.model_files import check_model_files

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MOST_BYTES = 64 << 20


def hashes_of(directory: Path, leave_out: Path | None = None) -> dict[str, str]:
    """Return the SHA-256 of every file under a directory, by its path there, in order.

    Args:
        directory: every file in it counts, hidden ones too.
        leave_out: the listing itself, where it lies there.

    Raises:
        ModelError: it is no directory, holds nothing, or a name that a line can't hold.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory. Give the directory of a model.")
    check_model_files(directory)
    skipped = None if leave_out is None else leave_out.resolve()
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() and not path.is_file():
            raise ModelError(f"{path} is a link to a directory or to nothing. Replace it by files.")
        if not path.is_file() or path.resolve() == skipped:
            continue
        if not name.isprintable() or "\\" in name:
            raise ModelError(f"{directory} holds a file with the name {name!a}. Rename it.")
        found[name] = sha256(path)
    if not found:
        raise ModelError(f"{directory} holds no files.")
    return found


def listing_text(hashes: Mapping[str, str]) -> str:
    """Return the listing that `sha256sum -c` reads too."""
    return "".join(f"{each}  {name}\n" for name, each in hashes.items())


def read_listing(path: Path) -> dict[str, str]:
    """Return the hashes of a listing by file.

    Raises:
        ModelError: it can't be read, is no listing, or names a file twice or outside.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError
        lines = path.read_text(encoding="utf-8").splitlines()
        found: dict[str, str] = {}
        for line in lines:
            match = _LINE.fullmatch(line)
            if match is None:
                raise ValueError
            name = match[2].removeprefix("./")
            if name in found or name.startswith("/") or ".." in Path(name).parts:
                raise ValueError
            found[name] = match[1]
    except OSError as error:
        raise ModelError(f"cannot read the listing {path}: {error.strerror}.") from None
    except ValueError:
        raise ModelError(
            f"{path} is no listing of hashes: lines of a SHA-256, two spaces and a file, each file"
            " once. `mst models manifest DIR` makes one."
        ) from None
    if not found:
        raise ModelError(f"{path} lists no file.")
    return found


def verify_listing(directory: Path, listing: Path) -> int:
    """Return how many files of a directory are as a listing says.

    Raises:
        ModelError: one differs, is missing, or is not listed; names it.
    """
    expected = read_listing(listing)
    found = hashes_of(directory, leave_out=listing)
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not listed" for name in found if name not in expected]
    wrong += [f"{name} differs" for name, each in found.items() if expected.get(name, each) != each]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{directory} is not what {listing} lists: {', '.join(sorted(wrong)[:3])}{more}."
            " Don't use it; copy it again from the source."
        )
    return len(found)
