"""Draws that nobody can repeat without the run's key: who takes part in a step, and its noise.

The key lies beside the run while it may be resumed, so that a step which is taken again draws what
it drew before: other noise on the same step would tell two noisy answers instead of one. It is
deleted with the run's end, because who has it can take the noise off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mst.durable import write_text
from mst.errors import RunError

if TYPE_CHECKING:
    import torch

KEY_FILE = "noise.key"
KEY_BYTES = 32
# The upper bytes of ChaCha20's nonce; the lower ones count blocks and name the step.
_PURPOSES = {"units": 1, "noise": 2}


def make_key(run: Path) -> bytes:
    """Write a new key for a run that begins, readable by its owner alone, and return it."""
    key = os.urandom(KEY_BYTES)
    write_text(run / KEY_FILE, key.hex() + "\n", mode=0o600)
    return key


def read_key(run: Path) -> bytes:
    """Return the key of a run that goes on.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        key = bytes.fromhex((run / KEY_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise RunError(
            f"{run / KEY_FILE} is missing or damaged, and without it the run's noise can't go on as"
            " it began, so its ε would not hold. Start a new run in another --output-dir."
        )
    return key


def drawn_units(key: bytes, step: int, units: int, sample_rate: float) -> list[int]:
    """Return which units take part in a step, each drawn by itself: Poisson sampling.

    Args:
        key: of the run.
        step: optimizer step, from 0.
        units: how many there are.
        sample_rate: probability of each.
    """
    uniform = _uniforms(key, "units", step)(units)
    found: list[int] = (uniform < sample_rate).nonzero()[:, 0].tolist()
    return found


def normal_draws(key: bytes, step: int) -> Callable[[int], torch.Tensor]:
    """Return a source of standard normal values, float64 on the host: the next so many a call.

    Box and Muller 1958, "A Note on the Generation of Random Normal Deviates", from uniform values
    of 53 bits. Values beyond 8.6 do not occur: their probability is 1e-17.
    """
    import torch

    uniforms = _uniforms(key, "noise", step)

    def draw(count: int) -> torch.Tensor:
        pairs = uniforms(2 * -(-count // 2)).view(2, -1)
        # Of (0, 1]: the logarithm of 0 is no number.
        radius = torch.sqrt(-2 * torch.log1p(-pairs[0]))
        angle = 2 * torch.pi * pairs[1]
        return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]

    return draw


def _uniforms(key: bytes, purpose: str, step: int) -> Callable[[int], torch.Tensor]:
    """Return a source of values of [0, 1), float64, from a stream of its own for each step."""
    import torch
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    # Four bytes count blocks from 0 (RFC 8439, 2.3); the rest is the nonce.
    nonce = bytes(4) + step.to_bytes(8, "little") + _PURPOSES[purpose].to_bytes(4, "little")
    stream = Cipher(ChaCha20(key, nonce), mode=None).encryptor()

    def draw(count: int) -> torch.Tensor:
        if not count:
            return torch.zeros(0, dtype=torch.float64)
        buffer = bytearray(stream.update(bytes(8 * count)))
        bits = torch.frombuffer(buffer, dtype=torch.int64)
        # 53 bits, without the sign that a shift to the right would keep.
        return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53

    return draw
