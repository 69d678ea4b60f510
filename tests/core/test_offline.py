"""A whole training run opens no socket and looks up no name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Python runs this at start-up, in the command and in every worker that it starts.
WATCH = """
import os, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{event} {args[-1]!r}\\n")
        raise OSError("a socket was opened")
sys.addaudithook(watch)
"""


def test_training_opens_no_socket(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    watched = tmp_path / "watched"
    # Without CI or the offline variables, as on a user's machine: peers phone home only there.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CI", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    environment |= {"PYTHONPATH": str(tmp_path), "WATCHED": str(watched)}
    attempt = [sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 9))"]
    assert subprocess.run(attempt, env=environment, capture_output=True).returncode != 0
    assert watched.read_text()  # the watch works
    watched.unlink()

    # Without the jail, whose test of itself opens sockets; the job would open none in any case.
    options = ["--max-steps", "2", "--val-size", "8", "--output-dir", str(tmp_path / "run")]
    options += ["--jail", "off", "--jail-reason", "what the job does by itself is watched"]
    done = subprocess.run(
        [sys.executable, "-m", "mst", "train", "--model", str(tiny_model), "--dataset",
         str(chat_rows), *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert not watched.exists(), watched.read_text()
