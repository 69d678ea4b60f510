"""Verifying a model's signature before a command uses the model, where one was given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import UsageError

if TYPE_CHECKING:
    from mst.seal.supply.signature import ModelSignature


def add_signature_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model's signature, as `mst train` names them."""
    group = parser.add_argument_group("where the model comes from")
    group.add_argument(
        "--model-signature", metavar="FILE", help="verify the model with it before it is loaded"
    )
    group.add_argument("--model-public-key", metavar="FILE", help="PEM, of who has signed it")


def verify_before_use(
    model: Path,
    signature: str | None,
    public_key: str | None,
    tell: Callable[[str], None] = lambda line: None,
) -> ModelSignature | None:
    """Verify a model and return what was verified; None when no signature was given.

    Args:
        model: its directory.
        signature: of --model-signature.
        public_key: of --model-public-key.
        tell: shown to the user first: every byte is read, about 0.5 to 2 GB a second.

    Raises:
        UsageError: one option without the other, or the model is a GGUF file.
        ModelError: the model is not what was signed.
    """
    if signature is None and public_key is None:
        return None
    if signature is None or public_key is None:
        raise UsageError("--model-signature and --model-public-key belong together: pass both.")
    if not model.is_dir():
        raise UsageError(f"--model-signature is of a model's directory; {model} is a file.")
    from mst.seal.supply.signature import verify_signature

    tell("verifying the model's signature")
    found = verify_signature(model, Path(signature).expanduser(), Path(public_key).expanduser())
    return found.signature
