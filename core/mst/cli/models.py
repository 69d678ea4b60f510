"""`mst models`: what lies on this machine, and putting a model there; `mst model` is the same."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from mst.cli.model_files import convert, manifest, verify
from mst.errors import EXIT_FAILED, UsageError

ACTIONS = ("list", "add", "verify", "pull", "convert", "manifest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="|".join(ACTIONS))
    found = actions.add_parser(
        "list", help="what lies here, and which devices here can tune it", allow_abbrev=False
    )
    _add_places(found)
    found.add_argument("--json", action="store_true", help="JSON on standard output")
    added = actions.add_parser(
        "add", help="put a model into the place for models, with its hashes", allow_abbrev=False
    )
    added.add_argument("path", metavar="PATH", help="a directory with config.json, *.safetensors")
    added.add_argument("--name", metavar="NAME", help="under which it is to lie there")
    added.add_argument("--link", action="store_true", help="leave its files where they are")
    _add_place(added, "put it there")
    verified = actions.add_parser(
        "verify", help="is it what was listed, or signed?", allow_abbrev=False
    )
    verified.add_argument("directory", metavar="NAME|DIR", help="as --model takes it")
    verified.add_argument("--signature", metavar="FILE", help="of mst sign or OpenSSF's tools")
    verified.add_argument("--public-key", metavar="FILE", help="PEM, that it was signed with")
    verified.add_argument(
        "--manifest", metavar="FILE", help="of mst models manifest or sha256sum (DIR.sha256)"
    )
    _add_places(verified)
    verified.add_argument("--json", action="store_true", help="JSON on standard output")
    _add_pull(actions)
    converted = actions.add_parser(
        "convert", help="pickled weights (*.bin, *.pt) as safetensors", allow_abbrev=False
    )
    converted.add_argument("directory", metavar="DIR", help="with the pickled weights")
    converted.add_argument("--output", required=True, metavar="DIR", help="new directory")
    listed = actions.add_parser(
        "manifest", help="SHA-256 of every file, as sha256sum -c reads them", allow_abbrev=False
    )
    listed.add_argument("directory", metavar="DIR")
    listed.add_argument("--output", metavar="FILE", help="instead of standard output")


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models-dir", metavar="DIR", nargs="+", default=[], help="look there too, first"
    )


def _add_place(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument("--models-dir", metavar="DIR", nargs=1, default=[], help=words)


def _add_pull(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pulled = actions.add_parser(
        "pull",
        help="fetch a model from a hub: the one command that uses a network",
        allow_abbrev=False,
    )
    pulled.add_argument("model", metavar="NAME", help="the hub's name of it: ORG/NAME")
    pulled.add_argument(
        "--from", dest="hub", choices=("huggingface", "modelscope"), default="huggingface",
        help="which hub it is (huggingface)",
    )  # fmt: skip
    pulled.add_argument("--revision", metavar="NAME", help="branch, tag or commit")
    pulled.add_argument("--endpoint", metavar="URL", help="address of the hub or a mirror")
    pulled.add_argument(
        "--allow-host", metavar="HOST", action="append", default=[],
        help="a host that the hub may send us to for large files; may be repeated",
    )  # fmt: skip
    pulled.add_argument(
        "--token-file", metavar="FILE", help="with the token of an account; sent to the hub alone"
    )
    pulled.add_argument("--yes", action="store_true", help="do not ask before using the network")
    _add_place(pulled, "put it there")


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    if args.action is None:
        raise UsageError(f"mst models: say what to do: {', '.join(ACTIONS)}.")
    if args.action == "convert":
        return convert(Path(args.directory), Path(args.output))
    if args.action == "manifest":
        return manifest(Path(args.directory), args.output)
    if args.action == "verify":
        return verify(args)
    return {"list": _list, "add": _add, "pull": _pull}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from mst.model.found import found_models, to_plain
    from mst.model.places import places
    from mst.model.ways import ways_here
    from mst.probe import machine_facts
    from mst.registry import load
    from mst.serial import to_json

    models = found_models(os.environ, args.models_dir)
    looked = places(args.models_dir, os.environ)
    machine = machine_facts(load()) if any(each.facts for each in models) else None
    ways = {
        each.path: ways_here(each.facts, machine)
        for each in models
        if each.facts is not None and machine is not None
    }
    if args.json:
        plain = {
            "models": [
                to_plain(each) | {"ways": [to_json(one) for one in ways.get(each.path, ())]}
                for each in models
            ],
            "places": [to_json(each) | {"there": each.path.is_dir()} for each in looked],
        }
        print(json.dumps(plain, indent=2, ensure_ascii=False, default=str))
        return 0
    from mst.cli.models_table import show_models, show_places

    if models:
        show_models(models, ways)
    else:
        print("No models were found.")
    show_places(looked, bool(models))
    return 0


def _add(args: argparse.Namespace) -> int:
    from mst.model.adding import add
    from mst.model.places import models_home

    def tell(line: str) -> None:
        print(f"{line} …", file=sys.stderr)

    source = Path(args.path).expanduser()
    found = add(source, args.name, models_home(args.models_dir, os.environ), args.link, tell)
    from mst.cli.models_table import show_added

    show_added(found, "linked" if args.link else "added")
    return 0


def _pull(args: argparse.Namespace) -> int:
    from mst.cli.models_table import Bar, show_added
    from mst.hub.pull import order, pull
    from mst.model.places import models_home
    from mst.seal.keys.key_file import read_word

    token = None
    if args.token_file is not None:
        token = read_word(Path(args.token_file).expanduser(), "--token-file")
    asked = order(
        args.model, args.hub, args.endpoint, args.revision, tuple(args.allow_host), token,
        os.environ,
    )  # fmt: skip
    place = models_home(args.models_dir, os.environ)
    hosts = " and ".join((asked.host, *asked.allow_hosts))
    if not args.yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(
                f"mst models pull would connect to {hosts}, which a person has to agree to: type it"
                " on a terminal, or pass --yes."
            )
        print(
            f"{asked.repository} is fetched from {hosts}, to {place / asked.repository}. That host"
            " sees this machine's address and which model it is; nothing else is sent.",
            file=sys.stderr,
        )
        print("Connect? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was sent.", file=sys.stderr)
            return EXIT_FAILED
    with Bar() as bar:
        found = pull(asked, place, os.environ, bar.tell, bar.progress)
    show_added(found, "pulled")
    return 0
