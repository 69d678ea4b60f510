"""Running the worker of a server, and writing into the audit log what it tells."""

from __future__ import annotations

from collections.abc import Mapping

from mst.errors import MstError
from mst.launch import KILLED, how_it_ended, run_worker, worker_environment
from mst.seal.audit.told import recording
from mst.seal.keys.ring import NO_KEYS, KeyRing, handed_down
from mst.serve.http.listening import TOLD_TO_END, Listening

# oneDNN makes kernels for each length of a prompt, and keeps those of 1,024 products: at
# SmolLM2-135M's sizes they would take 400 MB. A step takes one for each shape of a layer, of which
# a decoder like Llama's has six.
_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
_EVENTS = frozenset({"serve.key", "serve.ended"})


def run(
    job: str,
    listening: Listening,
    environ: Mapping[str, str],
    plan: Mapping[str, str],
    keys: KeyRing = NO_KEYS,
) -> int:
    """Serve in the foreground; return the worker's exit code, 0 where it was told to end.

    Args:
        job: what is served: a `mst.serve.http.job.ServeJob` as JSON.
        listening: where.
        environ: the process's environment.
        plan: what the engine adds to it.
        keys: the user's, for an encrypted run.

    Raises:
        MstError: the worker was killed.
    """
    environment = _KERNELS_KEPT | worker_environment(environ, plan)
    # Names of keys and counts, and nothing else.
    with recording(_EVENTS, texts=("key",)) as writing, handed_down(keys) as held:
        handles = [listening.listener, listening.control, writing]
        handles += [] if held is None else [held]
        arguments = [job, *map(str, handles)]
        code = run_worker("mst.serve.http.worker", arguments, environment, handles)
    if code == KILLED:
        advice = (
            "What it was answering is lost. Start it again, with a smaller --batch or --context"
            " where memory is short"
        )
        raise MstError(f"{how_it_ended(code, advice)}.")
    return 0 if code == TOLD_TO_END else code
