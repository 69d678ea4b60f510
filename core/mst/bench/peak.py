"""What a device multiplies at the most: the peak beside which a cell's products are held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mst.bench.process import mst_command, run_watched
from mst.bench.run_cell import PeakOf
from mst.errors import MstError
from mst.facts import DeviceFacts
from mst.launch import run_worker, worker_environment

_SECONDS = 120.0


def measure_peak(device: str, dtype: str, threads: int | None, environ: Mapping[str, str]) -> int:
    """Measure a device's largest square product in a worker, which prints it as JSON.

    Args:
        device: as `--device` takes it.
        dtype: torch dtype name.
        threads: of a CPU; None for all of its cores.
        environ: the process's environment.

    Returns:
        The worker's exit code.

    Raises:
        NoDeviceError: it isn't here.
    """
    from mst.facts import torch_names
    from mst.probe import backend_environment, machine_facts, select_device
    from mst.registry import load

    registry = load()
    report, found, able = select_device(machine_facts(registry), device)
    variables = backend_environment(registry, report.name, [found])
    asked = {
        "backend": report.name,
        "torch_device": torch_names([found], able)[0],
        "dtype": dtype,
        "threads": threads or found.compute_units or 1,
        "memory_bytes": found.memory_free_bytes or 2**30,
    }
    environment = worker_environment(environ, variables)
    return run_worker("mst.bench.peak_worker", [json.dumps(asked)], environment)


def remembered_peaks(directory: Path, environ: Mapping[str, str], seal: tuple[str, ...]) -> PeakOf:
    """Return a function that measures each device's peak once in each dtype.

    Args:
        directory: takes the logs.
        environ: of the commands.
        seal: options of the jail and the audit log.
    """
    known: dict[tuple[str, str, int], tuple[float | None, str]] = {}

    def peak_of(device: DeviceFacts, dtype: str, threads: int) -> tuple[float | None, str]:
        name = f"{device.backend}:{device.index}"
        key = (name, dtype, threads)
        if key not in known:
            command = mst_command(
                "bench", "peak", "--device", name, "--dtype", dtype, "--threads", str(threads),
                "--json", *seal,
            )  # fmt: skip
            log = directory / f"peak-{device.backend}-{device.index}-{dtype}.log"
            ended = run_watched(command, log, environ, _SECONDS)
            known[key] = (None, ended.message or f"it ended with code {ended.code}")
            if ended.code == 0:
                last = ended.output.strip().splitlines()[-1]
                known[key] = (float(json.loads(last)["tflops"]), "")
        return known[key]

    return peak_of


def product_tflops(asked: Mapping[str, object]) -> float:
    """Return the TFLOPS of the largest square product, in the worker.

    Raises:
        MstError: the backend can't be activated, or the device refuses.
    """
    import torch

    from mst.conformance.timing import product_tflops as measured
    from mst.probe import activate
    from mst.registry import load

    activate(load(), str(asked["backend"]))
    device = torch.device(str(asked["torch_device"]))
    if device.type == "cpu":
        torch.set_num_threads(int(str(asked["threads"])))
    try:
        dtype = getattr(torch, str(asked["dtype"]))
        return measured(device, dtype, int(str(asked["memory_bytes"])))
    except RuntimeError as error:
        raise MstError(f"the product could not be measured: {error}") from None
