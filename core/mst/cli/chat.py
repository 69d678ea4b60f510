"""`mst chat`: talk to a run, a model or a server in the terminal. Nothing is written to disk."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mst.cli.keys import add_key_options, ring_given
from mst.cli.language import add_language_option, language_asked
from mst.cli.target import add_target_options
from mst.errors import Interrupted, UsageError
from mst.seal.supply.before_use import add_signature_options, verify_before_use

if TYPE_CHECKING:
    from mst.chat import Sampling
    from mst.chat_remote import Server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to talk to, and how it answers."""
    add_target_options(parser, "run, model directory, GGUF file or model name")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer once and leave; standard output holds the answer alone. `ps` shows it to"
        " other users of the machine while it runs",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message; give the one of the training rows, which are not read here",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 for the most likely tokens (0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="share to draw from (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    add_language_option(parser)
    add_key_options(parser)
    add_signature_options(parser)
    group = parser.add_argument_group("a running server")
    group.add_argument(
        "--server", metavar="URL|SOCKET",
        help="talk to a server of OpenAI's API, such as mst serve, and load nothing; MODEL is then"
        " a name of its own (its first)",
    )  # fmt: skip
    group.add_argument(
        "--api-key-file", metavar="FILE", help="of mode 0600, with the key that the server asks for"
    )
    group.add_argument(
        "--server-ca", metavar="FILE", help="PEM of the authority that has signed its certificate"
    )


def unsealed(args: argparse.Namespace) -> str | None:
    """Return why no jail is entered: the server that was named would be out of reach there."""
    if args.server is None:
        return None
    return f"no jail: it asks {_server(args).shown} alone, and loads no model"


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    from mst.chat import chat, prepare_chat
    from mst.seal.audit import record
    from mst.seal.audit.facts import model_facts

    if args.server is not None:
        return _run_remote(args)
    for flag in ("api_key_file", "server_ca"):
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --server.")
    sampling = _sampling(args)
    keys = ring_given(args)
    job = prepare_chat(
        args.target,
        args.device,
        sampling,
        os.environ,
        which=args.checkpoint,
        system=args.system,
        prompt=args.prompt,
        keys=keys,
        language=language_asked(args),
    )
    verify_before_use(Path(job.model.weights), args.model_signature, args.model_public_key)
    record("chat.begun", name=job.name, device=job.torch_device, **model_facts(job.model))
    return chat(job, os.environ, keys)


def _sampling(args: argparse.Namespace) -> Sampling:
    from mst.chat import Sampling

    for flag, good, words in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= args.seed < 2**63, "0 or more, below 2^63"),
    ):
        if not good:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} must be {words}; found {getattr(args, flag)}.")
    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)


# Options of models that are loaded here.
_HERE = ("checkpoint", "key_file", "passphrase_file", "pkcs11", "model_signature",
         "model_public_key", "allow_net", "jail_reason")  # fmt: skip


def _run_remote(args: argparse.Namespace) -> int:
    from mst.chat_remote import Remote, chosen_model
    from mst.chat_terminal import ask_once, converse, edit_lines
    from mst.seal.audit import record

    for flag in _HERE:
        if getattr(args, flag) is not None:
            raise UsageError(
                f"--{flag.replace('_', '-')} is of a model that is loaded here, and --server loads"
                " none. Leave one of them out."
            )
    if args.jail not in ("auto", "off"):
        raise UsageError(
            f"--jail {args.jail} would keep this command from --server. Leave one of them out."
        )
    sampling, server, key = _sampling(args), _server(args), _api_key(args)
    try:
        remote = Remote(server, chosen_model(server, key, args.target), sampling, key)
        record("chat.begun", name=remote.model, server=server.shown)
        if args.prompt is not None:
            ask_once(remote, args.system, args.prompt)
        else:
            edit_lines()
            title = f"{remote.model}, at {server.shown}"
            converse(remote, title, args.system, language_asked(args))
    except KeyboardInterrupt:
        raise Interrupted("the answer was stopped.") from None
    return 0


def _server(args: argparse.Namespace) -> Server:
    from mst.chat_remote import server_of

    return server_of(args.server, args.server_ca)


def _api_key(args: argparse.Namespace) -> str | None:
    if args.api_key_file is None:
        return None
    from mst.seal.keys.key_file import read_word

    return read_word(Path(args.api_key_file).expanduser(), "--api-key-file")
