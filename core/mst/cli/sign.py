"""`mst sign`: sign a model directory with a key of one's own, offline."""

from __future__ import annotations

import argparse
from pathlib import Path

from mst.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is signed and with what."""
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a model's, such as RUN/merged")
    parser.add_argument("--private-key", metavar="FILE", help="PEM, readable by you alone")
    parser.add_argument("--output", metavar="FILE", help="the signature (DIR.sig)")
    parser.add_argument(
        "--generate-key", metavar="FILE", help="make a P-256 key there, and FILE.pub beside it"
    )


def run(args: argparse.Namespace) -> int:
    """Make a key, sign, or both."""
    from mst.seal.supply.signature import generate_key, sign

    key = args.private_key
    if args.generate_key is not None:
        if key is not None:
            raise UsageError("mst sign: pass --private-key or --generate-key, not both.")
        key = args.generate_key
        public = generate_key(Path(key))
        print(f"key     {key}: keep it secret\npublic  {public}: give it to who verifies")
        if args.directory is None:
            return 0
    if args.directory is None or key is None:
        raise UsageError(
            "mst sign: pass a directory and --private-key FILE, or --generate-key FILE."
        )
    directory = Path(args.directory)
    named = directory.absolute()
    output = named.with_name(f"{named.name}.sig") if args.output is None else Path(args.output)
    found = sign(directory, Path(key), output)
    print(f"signed  {found.signature.files} files of {directory} in {output}")
    print(f"key     SHA-256 {found.signature.public_key_sha256}")
    if found.not_covered:
        print(f"note    left out, as model signing does: {', '.join(found.not_covered)}")
    return 0
