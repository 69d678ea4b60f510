"""The actions of `mst models` on the files of one model: convert, manifest and verify."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from mst.errors import UsageError


def convert(directory: Path, output: Path) -> int:
    """Write pickled weights as safetensors, and say what was written."""
    from mst.quantities import gib
    from mst.seal.supply.conversion import convert as converted
    from mst.seal.supply.conversion import prepare_conversion

    report = converted(prepare_conversion(directory, output), os.environ)
    print(
        f"converted  {output}: {report.tensors} tensors, {gib(report.weight_bytes)}, each compared"
        " with its source"
    )
    for name, first in report.tied.items():
        print(f"tied       {name} is {first}, as config.json says")
    if report.ignored:
        print(f"left out   {len(report.ignored)} entries that are no tensors")
    return 0


def manifest(directory: Path, output: str | None) -> int:
    """Write the hashes of a directory's files, to a file or to standard output."""
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


def verify(args: argparse.Namespace) -> int:
    """Compare a model with its hashes or its signature, and remember when that was."""
    from mst.model.locate import locate
    from mst.seal.supply.standing import remember, verify_model

    if (args.signature is None) != (args.public_key is None):
        raise UsageError("mst models verify: --signature and --public-key belong together.")
    if args.signature is not None and args.manifest is not None:
        raise UsageError("mst models verify: pass --signature or --manifest, not both.")
    directory = Path(args.directory).expanduser()
    if not directory.exists():
        directory = locate(args.directory, args.models_dir, os.environ).path
    if args.signature is not None:
        return _verify_signature(directory, args)
    if args.manifest is not None:
        from mst.seal.supply.listing import verify_listing

        files = verify_listing(directory, Path(args.manifest))
        state = remember(directory, "listing")
    else:
        files, state = verify_model(directory)
    if args.json:
        plain = {"files": files, "listed": True, "source": state.source, "when": state.verified}
        print(json.dumps(plain))
    else:
        against = "each as listed" if state.source == "listing" else "each as the cache names it"
        print(f"verified  {directory}: {files} files, {against}")
    return 0


def _verify_signature(directory: Path, args: argparse.Namespace) -> int:
    from mst import serial
    from mst.seal.supply.signature import verify_signature
    from mst.seal.supply.standing import remember

    found = verify_signature(directory, Path(args.signature), Path(args.public_key))
    if directory.is_dir():
        remember(directory, "signature")
    if args.json:
        print(serial.dumps(found), end="")
        return 0
    print(f"verified  {directory}: {found.signature.files} files, each as signed")
    print(f"key       SHA-256 {found.signature.public_key_sha256}")
    if found.not_covered:
        print(f"note      not signed, and not read by mst: {', '.join(found.not_covered)}")
    return 0
