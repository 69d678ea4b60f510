"""`mst apikeys`: the keys of those who may ask a server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mst.serve import api_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="add|list|remove")
    add = actions.add_parser("add", help="make a key, and show it once")
    add.add_argument("name", metavar="NAME", help="of the caller, for logs and limits")
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="at most (no limit)")
    add.add_argument(
        "--tokens-per-day", type=int, metavar="N", help="of prompts and answers, at most (no limit)"
    )
    add.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="that it may ask (all)"
    )
    listing = actions.add_parser("list", help="show names and limits, and never a key")
    listing.add_argument("--json", action="store_true", help="as JSON")
    remove = actions.add_parser("remove", help="take a key away, from a running server too")
    remove.add_argument("name", metavar="NAME", help="of the key")
    for each in (add, listing, remove):
        each.add_argument(
            "--keys-file", metavar="FILE", help="of the keys (mst/api-keys.json in the user's state"
            " directory)"
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    from mst.seal.audit import record

    path = Path(args.keys_file).expanduser() if args.keys_file else api_keys.default_path()
    if args.action == "add":
        key = api_keys.add(
            path, args.name, args.requests_per_minute, args.tokens_per_day, args.models
        )
        record("apikey.added", name=args.name)
        print(key)
        return 0
    if args.action == "remove":
        api_keys.remove(path, args.name)
        record("apikey.removed", name=args.name)
        print(f"{args.name} may ask no more.")
        return 0
    keys = api_keys.read(path)
    if args.json:
        print(json.dumps([api_keys.shown(each) for each in keys], indent=2))
        return 0
    for each in keys:
        limits = [
            f"{limit} {words}"
            for limit, words in (
                (each.requests_per_minute, "requests a minute"),
                (each.tokens_per_day, "tokens a day"),
            )
            if limit is not None
        ]
        limits += [f"models {', '.join(each.models)}"] if each.models else []
        print(f"{each.name}  since {each.created}  {'; '.join(limits) or 'no limits'}")
    if not keys:
        print(f"No keys in {path}. Make one: mst apikeys add NAME")
    return 0
