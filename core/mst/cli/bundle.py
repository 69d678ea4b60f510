"""`mst bundle`: everything for a machine without a network, made here and verified there."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mst.bundle.target import AUTO, DEVICES, own_python, target_of
from mst.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="create|verify")
    create = actions.add_parser(
        "create", help="wheels, models, sources and an installer, in one directory",
        allow_abbrev=False,
    )  # fmt: skip
    create.add_argument("--device", required=True, choices=DEVICES, help="chips of that machine")
    create.add_argument(
        "--python", metavar="NUMBER", default=own_python(), help=f"of it ({own_python()})"
    )
    create.add_argument(
        "--platform", metavar="NAME", default=AUTO,
        help="of it: manylinux_2_34_x86_64, manylinux_2_34_aarch64 (auto: this architecture)",
    )  # fmt: skip
    create.add_argument(
        "--model", nargs="+", action="extend", default=[], metavar="DIR|NAME", help="models to take"
    )
    create.add_argument(
        "--extra", nargs="*", default=None, metavar="NAME",
        help="extras of mst-train (demo serve data qlora)",
    )  # fmt: skip
    create.add_argument(
        "--package", nargs="+", action="extend", default=[], metavar="NAME",
        help="further packages, such as a vendor's plugin",
    )  # fmt: skip
    create.add_argument(
        "--wheels", metavar="DIR", help="take wheels from there; no network is used"
    )
    create.add_argument("--source", metavar="DIR", help="a checkout of mst (where this mst runs)")
    create.add_argument("--sign", metavar="FILE", help="private key of mst sign --generate-key")
    create.add_argument(
        "--out", "--output", dest="output", required=True, metavar="DIR", help="new directory"
    )
    verify = actions.add_parser(
        "verify", help="is every file of a bundle as it was made?", allow_abbrev=False
    )
    verify.add_argument("directory", metavar="DIR")
    verify.add_argument("--public-key", metavar="FILE", help="PEM, that it must be signed with")
    verify.add_argument("--json", action="store_true", help="JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    if args.action is None:
        raise UsageError("mst bundle: say what to do: create or verify.")
    return _create(args) if args.action == "create" else _verify(args)


def _create(args: argparse.Namespace) -> int:
    from mst.bundle.create import EXTRAS, BundleRequest, create_bundle
    from mst.quantities import gib

    request = BundleRequest(
        target=target_of(args.device, args.python, args.platform),
        output=Path(args.output),
        models=tuple(args.model),
        extras=EXTRAS if args.extra is None else _extras(args.extra),
        packages=tuple(map(_package, args.package)),
        wheels=None if args.wheels is None else Path(args.wheels),
        source=args.source,
        sign=None if args.sign is None else Path(args.sign),
    )
    manifest = create_bundle(request, os.environ, _tell)
    size = sum(int(each["bytes"]) for each in manifest.files.values())
    _tell("bundle", f"{request.output}: {len(manifest.packages)} wheels, {gib(size)}, verified")
    if request.sign is None:
        _tell("note", "not signed: who can change it unseen is whoever carries it (--sign KEY)")
    program = f"python{request.target.python} {request.output.name}/install.py"
    _tell("next", f"carry it over, then: {program}")
    return 0


def _tell(what: str, text: str) -> None:
    print(f"{what:<10} {text}", flush=True)


def _extras(names: list[str]) -> tuple[str, ...]:
    import re

    for each in names:
        if not re.fullmatch(r"[a-z0-9]+", each):
            raise UsageError(f"--extra takes names of extras, such as demo; found {each!r}.")
    return tuple(names)


def _package(text: str) -> str:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        found = Requirement(text)
    except InvalidRequirement:
        found = None
    # With an address, pip would go where nobody has set it to go.
    if found is None or found.url is not None:
        raise UsageError(
            f"--package takes a name, or a name with versions such as 'mst-mychip>=1'; found"
            f" {text!r}."
        )
    return str(found)


def _verify(args: argparse.Namespace) -> int:
    from mst import serial
    from mst.bundle.verify import verify_bundle

    key = None if args.public_key is None else Path(args.public_key)
    found = verify_bundle(Path(args.directory), key)
    if args.json:
        print(serial.dumps(found), end="")
        return 0
    target = found.target
    _tell("verified", f"{args.directory}: {found.files} files, each as listed")
    _tell("for", f"{target['device']}, Python {target['python']}, {target['platform']}")
    _tell("made", f"{found.created} by {found.created_by}")
    _tell("SHA256SUMS", f"SHA-256 {found.sums_sha256}")
    if found.public_key_sha256 is not None:
        _tell("key", f"SHA-256 {found.public_key_sha256}")
    elif found.signed:
        _tell("note", "its signature was not verified: pass --public-key FILE")
    else:
        _tell("note", "it has no signature: hashes show accidents, not who made it")
    return 0
