"""`mst model`: convert pickled weights, list a model's hashes, and verify a model before use."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from mst.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="convert|manifest|verify")
    convert = actions.add_parser(
        "convert", help="pickled weights (*.bin, *.pt) as safetensors", allow_abbrev=False
    )
    convert.add_argument("directory", metavar="DIR", help="with the pickled weights")
    convert.add_argument("--output", required=True, metavar="DIR", help="new directory")
    manifest = actions.add_parser(
        "manifest", help="SHA-256 of every file, as sha256sum -c reads them", allow_abbrev=False
    )
    manifest.add_argument("directory", metavar="DIR")
    manifest.add_argument("--output", metavar="FILE", help="instead of standard output")
    verify = actions.add_parser(
        "verify", help="is it what was signed, or listed?", allow_abbrev=False
    )
    verify.add_argument("directory", metavar="DIR")
    verify.add_argument("--signature", metavar="FILE", help="of mst sign or OpenSSF model signing")
    verify.add_argument("--public-key", metavar="FILE", help="PEM, that the signature is made with")
    verify.add_argument("--manifest", metavar="FILE", help="of mst model manifest or sha256sum")
    verify.add_argument("--json", action="store_true", help="JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    if args.action is None:
        raise UsageError("mst model: say what to do: convert, manifest or verify.")
    if args.action == "convert":
        return _convert(Path(args.directory), Path(args.output))
    if args.action == "manifest":
        return _manifest(Path(args.directory), args.output)
    return _verify(args)


def _convert(directory: Path, output: Path) -> int:
    from mst.quantities import gib
    from mst.seal.supply.conversion import convert, prepare_conversion

    report = convert(prepare_conversion(directory, output), os.environ)
    print(
        f"converted  {output}: {report.tensors} tensors, {gib(report.weight_bytes)}, each compared"
        " with its source"
    )
    for name, first in report.tied.items():
        print(f"tied       {name} is {first}, as config.json says")
    if report.ignored:
        print(f"left out   {len(report.ignored)} entries that are no tensors")
    return 0


def _manifest(directory: Path, output: str | None) -> int:
    from mst.durable import write_text
    from mst.errors import RunError
    from mst.seal.supply.listing import hashes_of, listing_text

    target = None if output is None else Path(output)
    hashes = hashes_of(directory, leave_out=target)
    if target is None:
        sys.stdout.write(listing_text(hashes))
        return 0
    try:
        write_text(target, listing_text(hashes))
    except OSError as error:
        raise RunError(f"cannot write --output {target}: {error.strerror}.") from None
    print(f"listed  {len(hashes)} files of {directory} in {target}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from mst import serial
    from mst.seal.supply.listing import verify_listing
    from mst.seal.supply.signature import verify_signature

    directory = Path(args.directory)
    if (args.signature is None) != (args.public_key is None):
        raise UsageError("mst model verify: --signature and --public-key belong together.")
    if (args.signature is None) == (args.manifest is None):
        raise UsageError(
            "mst model verify: pass --signature FILE --public-key FILE, or --manifest FILE."
        )
    if args.manifest is not None:
        files = verify_listing(directory, Path(args.manifest))
        if args.json:
            print(json.dumps({"files": files, "listed": True}))
        else:
            print(f"verified  {directory}: {files} files, each as listed")
        return 0
    found = verify_signature(directory, Path(args.signature), Path(args.public_key))
    if args.json:
        print(serial.dumps(found), end="")
        return 0
    print(f"verified  {directory}: {found.signature.files} files, each as signed")
    print(f"key       SHA-256 {found.signature.public_key_sha256}")
    if found.not_covered:
        print(f"note      not signed, and not read by mst: {', '.join(found.not_covered)}")
    return 0
