"""The options that say what answers, for all commands that load a run or a model to talk."""

from __future__ import annotations

import argparse


def add_target_options(parser: argparse.ArgumentParser, kinds: str) -> None:
    """Add what is loaded, and where.

    Args:
        parser: of the command.
        kinds: what its target may be, for the help.
    """
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN|MODEL",
        help=f"{kinds} (the newest finished run under ./runs, or else the embedded model)",
    )
    parser.add_argument("--checkpoint", metavar="last|best|STEP", help="of the run")
    parser.add_argument("--device", default="auto", help="as of mst train (auto)")
