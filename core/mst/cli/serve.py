"""`mst serve`: a run, an artefact or a model behind OpenAI's API, on this machine, in the jail."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.cli.keys import add_key_options, ring_given
from mst.cli.target import add_target_options
from mst.errors import UsageError
from mst.quantities import size_bytes
from mst.seal.supply.before_use import add_signature_options, verify_before_use
from mst.serve.http.limits import Limits
from mst.serve.http.listening import LOOPBACK, Access, Place, listening, refuse_net, told_to_end
from mst.serve.http.tls import Tls, check
from mst.serve.packages import check_packages

if TYPE_CHECKING:
    from mst.serve.http.job import ServeJob


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is served, where it listens, who may ask and how much."""
    add_target_options(
        parser, "run, artefact of mst export, model directory, GGUF file or model name"
    )
    parser.add_argument("--served-name", metavar="NAME", help="for callers (the target's own)")
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="further adapters on the same base, each a model of its own for callers",
    )
    parser.add_argument("--force", action="store_true", help="serve an artefact that has failed")
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="of prompt and answer (what the model reads)"
    )
    parser.add_argument(
        "--engine", default="auto", metavar="auto|builtin|NAME",
        help="what computes the answers; auto takes the one that fits model and device, and says"
        " why (auto)",
    )  # fmt: skip
    parser.add_argument(
        "--engine-dir", metavar="DIR", help="where the environment of --engine NAME lies"
    )
    _add_place(parser)
    _add_limits(parser)
    add_key_options(parser)
    add_signature_options(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who comes in")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="HOST",
        help="address to listen on; beyond this machine only with TLS and API keys (127.0.0.1)",
    )  # fmt: skip
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 for any (8000)")
    group.add_argument("--socket", metavar="PATH", help="unix socket, for you alone, and no port")
    group.add_argument(
        "--server-name", nargs="+", action="extend", default=[], metavar="HOST",
        help="further names by which requests may call this server",
    )  # fmt: skip
    group.add_argument("--tls-cert", metavar="FILE", help="PEM certificate, with its chain")
    group.add_argument("--tls-key", metavar="FILE", help="its PEM key")
    group.add_argument("--tls-client-ca", metavar="FILE", help="PEM; only its clients come in")
    group.add_argument(
        "--api-keys", choices=("auto", "require", "off"), default="auto",
        help="auto asks for one beyond loopback and wherever --keys-file is given, and lets in you"
        " alone elsewhere; off lets in every user of this machine (auto)",
    )  # fmt: skip
    group.add_argument(
        "--web", choices=("on", "off"), default="off",
        help="a page at / to talk to the model in a browser (off)",
    )  # fmt: skip
    group.add_argument(
        "--keys-file", metavar="FILE", help="of `mst apikeys` (mst/api-keys.json in the user's"
        " state directory)",
    )  # fmt: skip


def _add_limits(parser: argparse.ArgumentParser) -> None:
    known = Limits()
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--batch", type=int, metavar="N",
        help="answers computed at once (32; on a CPU 4, and 4 more a core, but 32 at most)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-cache", metavar="SIZE|off",
        help="kept of finished answers, for prompts of the same caller that go on from them (a"
        " quarter of the weights, 1GiB at most)",
    )  # fmt: skip
    for flag, value, words in (
        ("--max-tokens", known.most_tokens, "longest answer"),
        ("--max-requests", known.requests, "answered or waiting at once"),
    ):
        group.add_argument(flag, type=int, default=value, metavar="N", help=f"{words} ({value})")
    group.add_argument("--body-size", default="4MiB", metavar="SIZE", help="of a request (4MiB)")
    for flag, seconds, words in (
        ("--header-seconds", known.header_seconds, "for a request's head"),
        ("--body-seconds", known.body_seconds, "for its body"),
        ("--grace-seconds", known.grace_seconds, "for answers under way, when told to end"),
    ):
        group.add_argument(
            flag, type=float, default=seconds, metavar="N", help=f"{words} ({seconds:g})"
        )
    group.add_argument(
        "--access-log", choices=("on", "off"), default="on",
        help="a line for each request, without its text (on)",
    )  # fmt: skip


@contextlib.contextmanager
def outside(args: argparse.Namespace) -> Iterator[None]:
    """Check what can be checked early, and listen, before the jail is entered."""
    check_packages()
    refuse_net(args.allow_net, "A server")
    _limits(args)
    _prefix_bytes(args)
    if args.batch is not None and args.batch < 1:
        raise UsageError(f"--batch must be at least 1; found {args.batch}.")
    place = Place(args.host, args.port, args.socket)
    if args.web == "on" and place.path is not None:
        raise UsageError(
            "--web on is for browsers, which reach no --socket. Leave one of them out."
        )
    access = _access(args, place)
    if access.tls is not None:
        check(access.tls)
    # Where no key tells users apart, the kernel does.
    own_user = access.keys_file is None and args.api_keys != "off"
    with told_to_end(), listening(place, os.environ, own_user) as found:
        args.listening, args.listeners = found, (found.listener,)
        yield


def run(args: argparse.Namespace) -> int:
    """Serve until told to end."""
    from mst.apart import apart
    from mst.seal.audit import record
    from mst.seal.keys.ring import ring_with
    from mst.serve.http.command import run as serve

    place = args.listening.place
    access = _access(args, place)
    # What this process loads stays in memory beside the model for as long as it is served.
    found = apart(lambda: _prepared(args, access))
    where = place.url(tls=access.tls is not None)
    if found["why"] is not None:
        print(f"engine  {found['engine']}: {found['why']}", flush=True)
    record(
        "serve.begun",
        engine=found["engine"],
        where=where,
        api_keys=access.keys_file is not None,
        **found["facts"],
    )
    if found["batch"] is not None:
        print(f"batch   {found['batch']}", flush=True)
    print(f"serve   {found['facts']['name']} at {where}", flush=True)
    if args.web == "on":
        print(f"web     {where.removesuffix('v1')}", flush=True)
    keys = ring_with(found["keys"])
    return serve(found["job"], args.listening, os.environ, found["environment"], keys)


def _prepared(args: argparse.Namespace, access: Access) -> dict[str, Any]:
    """Return what is served, and what is to be said of it."""
    from mst import serial
    from mst.seal.audit.facts import model_facts
    from mst.seal.keys.ring import secrets_of
    from mst.serve.http.job import What, prepare

    what = What(
        args.target, args.checkpoint, args.served_name, tuple(args.adapter), args.force,
        args.context, args.batch, _prefix_bytes(args), args.engine, args.engine_dir,
    )  # fmt: skip
    keys = ring_given(args)
    job = prepare(what, args.device, _limits(args), access, os.environ, keys)
    job = replace(job, access_log=args.access_log == "on", web=args.web == "on")
    verify_before_use(Path(job.engine.model.weights), args.model_signature, args.model_public_key)
    return {
        "job": serial.dumps(job),
        "environment": dict(job.engine.environment),
        "engine": "builtin" if job.reason is None else job.reason.value,
        "why": None if job.reason is None else job.reason.why,
        "batch": _batch(args, job),
        "facts": {
            "name": job.name,
            "device": job.engine.torch_device,
            "adapters": sorted(job.engine.adapters),
            **model_facts(job.engine.model),
        },
        "keys": secrets_of(keys),
    }


def _batch(args: argparse.Namespace, job: ServeJob) -> str | None:
    """Return how many answers are computed at once, and why; None where an engine decides."""
    from mst.serve.job import default_batch

    if args.batch is not None:
        return f"{args.batch}: asked for"
    if job.external is not None:
        return None
    found = default_batch(job.engine.torch_device, job.engine.threads)
    return f"{found.value}: {found.why}"


def _limits(args: argparse.Namespace) -> Limits:
    for flag in ("max_tokens", "max_requests", "header_seconds", "body_seconds"):
        # Not `<= 0`, which NaN would pass.
        if not getattr(args, flag) > 0:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} must be above 0; found {getattr(args, flag)}.")
    if not 0 <= args.grace_seconds < 86400:
        raise UsageError(f"--grace-seconds must be 0 or more; found {args.grace_seconds}.")
    return Limits(
        body_bytes=size_bytes(args.body_size, "--body-size"),
        header_seconds=args.header_seconds,
        body_seconds=args.body_seconds,
        requests=args.max_requests,
        most_tokens=args.max_tokens,
        grace_seconds=args.grace_seconds,
    )


def _prefix_bytes(args: argparse.Namespace) -> int | None:
    if args.prefix_cache is None:
        return None
    return 0 if args.prefix_cache == "off" else size_bytes(args.prefix_cache, "--prefix-cache")


def _access(args: argparse.Namespace, place: Place) -> Access:
    """Return who may ask.

    Raises:
        UsageError: beyond loopback without TLS or keys, or keys are asked for and there is none.
    """
    from mst.serve.api_keys import default_path, read

    if (args.tls_cert is None) != (args.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together.")
    if args.tls_client_ca is not None and args.tls_cert is None:
        raise UsageError("--tls-client-ca goes with --tls-cert and --tls-key.")
    if not place.on_loopback:
        if args.tls_cert is None:
            raise UsageError(
                f"--host {place.host} is heard beyond this machine, and prompts would cross the"
                " network for all to read. Pass --tls-cert and --tls-key, or leave --host out."
            )
        if args.api_keys == "off":
            raise UsageError(
                f"--host {place.host} is heard beyond this machine, where --api-keys off would let"
                " anybody ask. Leave one of them out."
            )
    wanted = args.api_keys == "require" or not place.on_loopback
    wanted |= args.keys_file is not None and args.api_keys != "off"
    keys_file = Path(args.keys_file).expanduser() if args.keys_file else default_path()
    if wanted and not read(keys_file):
        raise UsageError(
            f"callers are to show an API key, and {keys_file} has none. Make one: mst apikeys add"
            " NAME"
        )
    return Access(
        hosts=tuple(each.lower() for each in (*LOOPBACK, place.host, *args.server_name)),
        any_address=not place.on_loopback,
        any_name=place.path is not None,
        keys_file=str(keys_file.absolute()) if wanted else None,
        tls=None if args.tls_cert is None else Tls(args.tls_cert, args.tls_key, args.tls_client_ca),
    )
