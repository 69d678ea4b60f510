"""Running the worker of a server, and writing into the audit log what it tells."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Mapping

from mst import serial
from mst.launch import run_worker, worker_environment
from mst.seal.audit import record
from mst.seal.keys.ring import NO_KEYS, KeyRing, handed_down
from mst.serve.http.job import ServeJob
from mst.serve.http.listening import Listening

# Of a worker that SIGTERM has ended before it could handle it: while the model was loading.
_TOLD_TO_END = 128 + signal.SIGTERM
# oneDNN makes kernels for each length of a prompt, and keeps those of 1,024 products: at
# SmolLM2-135M's sizes they would take 400 MB. A step takes one for each shape of a layer.
_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
_EVENTS = frozenset({"serve.key", "serve.ended"})


def run(
    job: ServeJob, listening: Listening, environ: Mapping[str, str], keys: KeyRing = NO_KEYS
) -> int:
    """Serve in the foreground; return the worker's exit code, 0 where it was told to end.

    Args:
        job: what is served.
        listening: where.
        environ: the process's environment.
        keys: the user's, for an encrypted run.
    """
    environment = _KERNELS_KEPT | worker_environment(environ, job.engine.environment)
    reading, writing = os.pipe()
    notes = threading.Thread(target=_record_all, args=(reading,), daemon=True)
    notes.start()
    try:
        with handed_down(keys) as held:
            handles = [listening.listener, listening.control, writing]
            handles += [] if held is None else [held]
            arguments = [serial.dumps(job), *map(str, handles)]
            code = run_worker("mst.serve.http.worker", arguments, environment, handles)
            return 0 if code == _TOLD_TO_END else code
    finally:
        os.close(writing)
        notes.join()


def _record_all(pipe: int) -> None:
    """Record what the worker tells: names of keys and counts, and nothing else."""
    with open(pipe, encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                event = told.pop("event", "")
                if event in _EVENTS:
                    facts = {
                        str(name): value
                        for name, value in told.items()
                        if isinstance(value, int) or name == "key"
                    }
                    record(event, **facts)
