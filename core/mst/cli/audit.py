"""`mst audit`: look at the log of who did what, and see that nobody has changed it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.cli.language import add_language_option, language_asked
from mst.errors import EXIT_FAILED, UsageError
from mst.translation import translated

if TYPE_CHECKING:
    from mst.seal.audit.verification import Verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(
        dest="action", metavar="show|verify|key|export|pack|acknowledge|prune"
    )

    def action(name: str, words: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=words, allow_abbrev=False)

    show = action("show", "the events, oldest first")
    show.add_argument("--since", metavar="DATE", help="from this day on (UTC)")
    show.add_argument("--event", metavar="NAME", help="of this name, or beginning so: train.")
    show.add_argument("--json", action="store_true", help="the log's own lines")
    verify = action("verify", "check every line, every signature, and that no end was cut off")
    verify.add_argument("--checkpoint", metavar="FILE", help="that was exported and kept elsewhere")
    verify.add_argument(
        "--public-key", metavar="FILE", help="PEM, of the key that must have signed"
    )
    verify.add_argument(
        "--pack", metavar="FILE", help="check an archive of `mst audit pack` instead"
    )
    verify.add_argument("--json", action="store_true", help="JSON on standard output")
    action("key", "print the public key of the log")
    export = action("export", "write a signed checkpoint, to keep elsewhere")
    export.add_argument("file", metavar="FILE")
    pack = action("pack", "write one signed archive of what a run did, for an auditor")
    pack.add_argument("run", metavar="RUN", help="a run directory")
    pack.add_argument("--output", metavar="FILE", help="default: RUN-audit.zip, beside the run")
    add_language_option(pack)
    known = action("acknowledge", "go on after somebody has changed the log")
    known.add_argument("--reason", metavar="TEXT", required=True, help="goes into the log")
    prune = action("prune", "remove files whose events are all older")
    prune.add_argument("--before", metavar="DATE", required=True, help="at least 6 months ago")


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    from mst.seal.audit.place import directory_of

    if args.action is None:
        raise UsageError("mst audit: say what to do: `mst audit show`, or see `mst audit --help`.")
    directory = directory_of(args.audit_log)
    code: int = globals()[f"_{args.action}"](directory, args)
    return code


def _day(text: str, flag: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{flag} takes a day as 2026-11-26; found {text!r}.") from None


def _show(directory: Path, args: argparse.Namespace) -> int:
    from mst.seal.audit.chain import CHECKPOINT
    from mst.seal.audit.reading import events

    since = None if args.since is None else _day(args.since, "--since").isoformat()
    for line, event in events(directory, since, args.event):
        if args.json:
            print(line)
        elif args.event is not None or event["event"] != CHECKPOINT:  # they say nothing to people
            print(_sentence(event))
    return 0


def _sentence(event: dict[str, Any]) -> str:
    facts = " ".join(
        f"{name}={json.dumps(each, ensure_ascii=True)}" for name, each in event["facts"].items()
    )
    return (
        f"{event['time'][:19]}  {ascii(event['user'])[1:-1]}@{ascii(event['host'])[1:-1]}"
        f"  {ascii(event['event'])[1:-1]}  {facts}"
    )


def _verify(directory: Path, args: argparse.Namespace) -> int:
    from mst import serial
    from mst.seal.audit.key import read_public
    from mst.seal.audit.verification import read_export, verify

    checkpoint, public = None, None
    if args.checkpoint is not None:
        checkpoint, public = read_export(Path(args.checkpoint))
    if args.public_key is not None:
        public = read_public(Path(args.public_key))
    if args.pack is not None:
        return _check_pack(Path(args.pack), public, args.json)
    found = verify(directory, public, checkpoint)
    if args.json:
        print(serial.dumps(found), end="")
    else:
        _print_verification(found, checkpoint is not None)
    return EXIT_FAILED if found.problems else 0


def _check_pack(path: Path, public: str | None, as_json: bool) -> int:
    from mst import serial
    from mst.seal.pack.archive import check

    found = check(path, public)
    if as_json:
        print(serial.dumps(found), end="")
        return 0
    print(f"whole: {path}, {found.files} files of {found.run}, made {found.created[:19]}")
    print(f"signed by {found.public_key}")
    if public is None:
        print("note: whose key that is, is only shown by --public-key FILE, from `mst audit key`")
    return 0


def _pack(directory: Path, args: argparse.Namespace) -> int:
    from mst.runs import find_run
    from mst.seal.audit import key, open_log, record
    from mst.seal.audit.event import now
    from mst.seal.pack.archive import write
    from mst.seal.pack.evidence import collect
    from mst.seal.pack.page import page
    from mst.seal.pack.rules import ITEMS

    run = find_run(args.run).absolute()
    beside = run.with_name(f"{run.name}-audit.zip")
    target = beside if args.output is None else Path(args.output).absolute()
    with open_log(directory, "audit pack"):
        record("pack.begun", run=str(run), target=str(target))
        members = collect(run, directory)
        members["index.html"] = page(members)
        write(members, run, now(), key.load(directory), target)
        record("pack.ended", run=str(run), target=str(target), files=sorted(members))
    missing = [each.name for each in ITEMS if not set(each.members) <= set(members)]
    said = partial(translated, language=language_asked(args))
    print(said(f"wrote   {target}: {len(members)} files, signed with the audit log's key"))
    if missing:
        print(said(f"lacks   {', '.join(map(said, missing))}; index.html in it says why"))
    print(said("It holds names, paths and figures, and no row. Whoever gets it types:"))
    print(f"  mst audit verify --pack {shlex.quote(target.name)} --public-key key.pub")
    return 0


def _print_verification(found: Verification, against: bool) -> None:
    for each in found.files:
        print(f"{each.name}  {each.events} events, {each.first_time[:19]} … {each.last_time[:19]}")
    for text in found.acknowledged:
        print(f"acknowledged: {text}")
    for text in found.problems:
        print(f"changed: {text}")
    if found.problems:
        return
    print(f"whole: {found.events} events, {found.unsigned} of them after the last checkpoint")
    if found.unended:
        print(f"note: {found.unended} commands have begun and not ended: they run, or were killed")
    if not against:
        print(
            "note: that nobody has cut off the end, with its checkpoints, is only shown by"
            " --checkpoint FILE, from `mst audit export`"
        )


def _key(directory: Path, args: argparse.Namespace) -> int:
    from mst.seal.audit.key import PUBLIC, public_pem, read_public

    print(public_pem(read_public(directory / PUBLIC)), end="")
    return 0


def _export(directory: Path, args: argparse.Namespace) -> int:
    from mst.seal.audit.event import who
    from mst.seal.audit.upkeep import export

    value = export(directory, Path(args.file).absolute(), who(""))
    print(f"wrote {args.file}, over {value['checkpoint']['seq']} events. Keep it elsewhere.")
    return 0


def _acknowledge(directory: Path, args: argparse.Namespace) -> int:
    from mst.seal.audit.event import who
    from mst.seal.audit.upkeep import acknowledge

    if not args.reason.strip():
        raise UsageError("mst audit acknowledge --reason takes a sentence; found nothing.")
    found = acknowledge(directory, args.reason, who(""))
    for each in found.problems:
        print(f"acknowledged: {each}")
    print(f"the log goes on in {directory / found.file}")
    return 0


def _prune(directory: Path, args: argparse.Namespace) -> int:
    from mst.seal.audit.event import who
    from mst.seal.audit.upkeep import prune

    removed = prune(directory, _day(args.before, "--before"), who(""))
    for each in removed:
        print(f"removed {each.name}: {each.events} events to {each.last_time[:19]}")
    if not removed:
        print("nothing to remove: no file is wholly of before that day", file=sys.stderr)
    return 0
