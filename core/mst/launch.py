"""Start a worker process with the environment that the plan asks for, and wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence


def offline_environment() -> dict[str, str]:
    """Return variables that keep libraries from calling a host or loading vendor code unasked."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        # Only a backend's mst_activate loads vendor code: a torch-npu without its driver, left
        # behind in the environment, would break `import torch` for a job on the CPU.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        # transformers forks nothing here; the tokenizers' own pool would fight OpenMP for cores.
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def worker_environment(environ: Mapping[str, str], plan: Mapping[str, str]) -> dict[str, str]:
    """Return the worker's whole environment: the user's, made offline, then the plan's."""
    return {**environ, **offline_environment(), **plan}


def run_worker(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    keep_open: Sequence[int] = (),
) -> int:
    """Run `python -m module arguments` in the foreground and return its exit code.

    Args:
        module: of mst.
        arguments: its command line.
        environment: all of it.
        keep_open: file descriptors that the worker inherits, such as a lock's.

    Ctrl-C reaches the worker through the terminal's process group; this process only waits, so
    that the worker can save. SIGTERM is handed on. A death by signal N returns 128 + N.
    """
    worker = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=dict(environment),
        cwd=os.getcwd(),
        pass_fds=tuple(keep_open),
    )
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: worker.terminate()),
    }
    try:
        code = worker.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
