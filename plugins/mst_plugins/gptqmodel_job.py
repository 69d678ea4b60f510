"""GPTQ and AWQ by gptqmodel, in a process of its own that a second run goes on from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mst import serial
from mst.errors import EXIT_INTERRUPTED, Interrupted, MstError, PlanError
from mst.launch import how_it_ended, run_worker, worker_environment
from mst.model.facts import LinearShape
from mst_plugins.quantized_model import Scheme

# The worker changes parts of it that other versions don't have.
VERSION = "7.6.0"
# gptqmodel looks for AWQ's clipping so many outputs at a time.
_AWQ_OUT_MULTIPLE = 64
# A pass takes rows of about so many tokens together: it costs little more than one over a row of
# 40. Rows are not joined: a model's first position carries far larger values than others, and
# served it sees each row from there. SmolLM2-135M's GPTQ came to a divergence of 0.095 nats with
# 512 tokens joined, and to 0.072 without.
PASS_TOKENS = 1024
_HUB_PLACES = ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE")


@dataclass(frozen=True)
class QuantizeJob:
    """What the worker does; all paths are absolute. It says no more of the rows than where.

    Attributes:
        source: model directory.
        directory: an empty one, to be filled.
        work_dir: what a later run goes on from; the caller removes it in the end.
        scheme: of the layout "gptq" (then the method is GPTQ) or "awq".
        threads: CPU threads.
        calibration: file descriptor that the token ids are read from.
        progress: file descriptor that finished layers are written to.
    """

    source: str
    directory: str
    work_dir: str
    scheme: Scheme
    threads: int
    calibration: int
    progress: int


@dataclass(frozen=True)
class Progress:
    """How far a quantization is: `layer` of `layers` are done."""

    layer: int
    layers: int


def check(linears: Iterable[LinearShape], scheme: Scheme) -> None:
    """Make sure, before any work, that gptqmodel is here and can quantize these layers.

    Raises:
        PlanError: it is not; says what to do.
    """
    try:
        found = importlib.metadata.version("gptqmodel")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise PlanError(
            f"--format {scheme.layout} needs gptqmodel {VERSION} (found: {found}). Install it:"
            f" python -m pip install gptqmodel=={VERSION}; or pass --method rtn, which rounds"
            " without it."
        )
    for each in linears:
        if scheme.layout == "awq" and each.out_features % _AWQ_OUT_MULTIPLE:
            raise PlanError(
                f"{each.name} has {each.out_features} outputs; gptqmodel's AWQ takes multiples of"
                f" {_AWQ_OUT_MULTIPLE}. Pass --method rtn, or --format gptq."
            )


def rows_a_pass(rows: Sequence[Sequence[int]]) -> int:
    """Return how many rows, of which the longest sets the width, make a pass of `PASS_TOKENS`."""
    return max(1, PASS_TOKENS // max(map(len, rows)))


def rows_of_one_pass(rows: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return rows that make one pass of `PASS_TOKENS`, those with most tokens, for AWQ.

    Where passes differ in tokens, gptqmodel's AWQ goes by the inputs of its last pass alone, which
    has the shortest rows. These are of about one length, for the longest sets the width of all; a
    row that is longer than a pass is cut.
    """
    ordered = sorted((list(each[:PASS_TOKENS]) for each in rows), key=len)
    fitting = [
        ordered[max(0, end - PASS_TOKENS // len(longest)) : end]
        for end, longest in enumerate(ordered, 1)
    ]
    return max(fitting, key=lambda found: sum(map(len, found)))


def quantize(
    source: Path,
    directory: Path,
    work_dir: Path,
    scheme: Scheme,
    rows: Iterable[Sequence[int]],
    threads: int,
    environ: Mapping[str, str],
    tell: Callable[[Progress], None],
) -> None:
    """Quantize a model with GPTQ or AWQ on calibration rows, going on where a killed run stopped.

    The rows reach the worker through memory only. What it keeps in `work_dir` to go on from is
    encrypted with a key that is made of the rows.

    Args:
        source: model directory.
        directory: an empty one, filled with weights, config.json and tokenizer.
        work_dir: of this source, scheme and rows alone; made if it is missing.
        scheme: of the layout "gptq" or "awq".
        rows: token ids of each calibration row.
        threads: CPU threads.
        environ: the process's environment.
        tell: called after each layer, from another thread.

    Raises:
        Interrupted: the user stopped it; the same call goes on.
        MstError: the worker failed, and has said why on standard error.
    """
    work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = work_dir / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    memory = os.memfd_create("calibration")
    with os.fdopen(memory, "w+", encoding="utf-8") as calibration:
        json.dump(list(map(list, rows)), calibration)
        calibration.flush()
        read_end, write_end = os.pipe()
        reader = threading.Thread(target=_listen, args=(read_end, tell))
        try:
            # In here: interrupted before the end is closed, it would be waited for without end.
            reader.start()
            job = QuantizeJob(
                source=str(source.absolute()),
                directory=str(directory.absolute()),
                work_dir=str(work_dir.absolute()),
                scheme=scheme,
                threads=threads,
                calibration=memory,
                progress=write_end,
            )
            code = run_worker(
                "mst_plugins.gptqmodel_worker",
                [serial.dumps(job)],
                worker_environment(environ, _environment(threads, temporary)),
                keep_open=(memory, write_end),
            )
        finally:
            os.close(write_end)
            if reader.ident is not None:
                reader.join()
    shutil.rmtree(temporary, ignore_errors=True)
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{source} was not quantized. Run the same command to go on.")
    if code:
        cause = how_it_ended(code, "Run the same command to go on, with more memory free")
        raise MstError(f"{source} was not quantized: {cause}.")


def _environment(threads: int, temporary: Path) -> dict[str, str]:
    return {
        # With one, gptqmodel 7.6.0 fails: its pool 'model_loader:cpu' asks for two.
        "GPTQMODEL_CPU_WORKERS": str(max(2, threads)),
        "OMP_NUM_THREADS": str(threads),
        # Else gptqmodel draws bars for each pass, which nobody sees.
        "TERM": "dumb",
        "TMPDIR": str(temporary.absolute()),
        # Else tokenicer, which gptqmodel imports, makes these at a fixed place in /tmp.
        **{name: str(temporary.absolute() / "hub") for name in _HUB_PLACES},
    }


def _listen(read_end: int, tell: Callable[[Progress], None]) -> None:
    with os.fdopen(read_end, encoding="utf-8") as lines:
        for line in lines:
            tell(serial.from_json(Progress, json.loads(line)))
