"""Keys that systemd-creds seals to this machine: its TPM, or a secret that root alone reads."""

from __future__ import annotations

import base64
import shutil
import subprocess

from mst.errors import EncryptionError

_COMMAND = "systemd-creds"
_NAME = "mst-data-key"
_SECONDS = 30


def seal_credential(key: bytes) -> str:
    """Return a key as this machine alone can open it, in base64.

    Raises:
        EncryptionError: the command is not here, or refuses.
    """
    sealed = _run("encrypt", key, "--systemd-creds")
    return base64.b64encode(b"".join(sealed.split())).decode()


def open_credential(sealed: str, file: str) -> bytes:
    """Return a key that was sealed to this machine.

    Args:
        sealed: as `seal_credential` returned it.
        file: whose key it is, for messages.

    Raises:
        EncryptionError: it was sealed elsewhere, or changed, or this user may not open it.
    """
    try:
        blob = base64.b64decode(sealed, validate=True)
    except ValueError:
        blob = b""
    return _run("decrypt", blob, file)


def _run(action: str, data: bytes, what: str) -> bytes:
    command = shutil.which(_COMMAND)
    if command is None:
        raise EncryptionError(
            f"{what} needs {_COMMAND}, which is not on this machine (systemd 250 has it). Use"
            " --key-file or a passphrase."
        )
    try:
        done = subprocess.run(
            [command, f"--name={_NAME}", action, "-", "-"],
            input=data, capture_output=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        code = done.returncode
    except (OSError, subprocess.TimeoutExpired):
        code = -1
    if code:
        raise EncryptionError(
            f"{what}: {_COMMAND} {action} failed with code {code}. The key was sealed on another"
            " machine, or this user may not use the machine's secret: run it as root, or use"
            " --key-file or a passphrase."
        )
    return done.stdout
