"""`mst chat`: talk to a run or a model in the terminal. Nothing is written to disk."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from mst.cli.keys import add_key_options, ring_given
from mst.errors import UsageError
from mst.seal.supply.before_use import add_signature_options, verify_before_use


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to talk to, and how it answers."""
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN|MODEL",
        help="run, model directory, GGUF file or model name (the newest finished run under ./runs,"
        " or else the embedded model)",
    )
    parser.add_argument("--checkpoint", metavar="last|best|STEP", help="of the run")
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
    add_key_options(parser)
    add_signature_options(parser)
    parser.add_argument("--device", default="auto", help="as of mst train (auto)")


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    from mst.chat import Sampling, chat, prepare_chat
    from mst.seal.audit import record
    from mst.seal.audit.facts import model_facts

    for flag, good, words in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= args.seed < 2**63, "0 or more, below 2^63"),
    ):
        if not good:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} must be {words}; found {getattr(args, flag)}.")
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
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
    )
    verify_before_use(Path(job.model.weights), args.model_signature, args.model_public_key)
    record("chat.begun", name=job.name, device=job.torch_device, **model_facts(job.model))
    return chat(job, os.environ, keys)
