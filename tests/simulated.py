"""The simulated chip for tests: environments in which it is plugged into this machine.

    subprocess.run([sys.executable, "-m", "mst", "devices"], env=simchip_environment(devices=2))

The vendor's packages are installed as a user would, once a test session; the driver library is
compiled once for each version of torch and kept in the user's cache directory.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VENDORS = Path(__file__).parent / "vendor"
GIB = 2**30
PIP = ("install", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")


def simchip_environment(
    devices: int = 1,
    memory_bytes: int = 4 * GIB,
    bf16: bool = True,
    fault: str = "",
    **more: str,
) -> dict[str, str]:
    """Return an environment with simulated chips under their own name.

    Args:
        devices: chips that are plugged in.
        memory_bytes: of each.
        bf16: whether they have bfloat16.
        fault: what is broken, as in SIMCHIP_FAULT.
        more: other variables; they win.
    """
    return _environment(("simchip",), devices, memory_bytes, bf16, fault, more)


def npu_environment(
    devices: int = 1,
    memory_bytes: int = 4 * GIB,
    bf16: bool = True,
    fault: str = "",
    **more: str,
) -> dict[str, str]:
    """Return an environment with simulated chips named npu and a stand-in for torch_npu."""
    more = {"SIMCHIP_NAME": "npu", **more}
    return _environment(("simchip", "torch_npu"), devices, memory_bytes, bf16, fault, more)


def _environment(
    packages: tuple[str, ...],
    devices: int,
    memory_bytes: int,
    bf16: bool,
    fault: str,
    more: dict[str, str],
) -> dict[str, str]:
    site = installed(*packages)
    driver_library(site)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SIMCHIP_")}
    if build := os.environ.get("SIMCHIP_BUILD_DIR"):
        kept["SIMCHIP_BUILD_DIR"] = build
    path = os.pathsep.join(filter(None, (str(site), kept.get("PYTHONPATH"))))
    return {
        **kept,
        "PYTHONPATH": path,
        "SIMCHIP_DEVICES": str(devices),
        "SIMCHIP_MEMORY_BYTES": str(memory_bytes),
        "SIMCHIP_BF16": str(int(bf16)),
        "SIMCHIP_FAULT": fault,
        **more,
    }


@functools.cache
def installed(*packages: str) -> Path:
    """Return a directory in which these packages of tests/vendor are installed."""
    target = Path(tempfile.mkdtemp(prefix="mst-vendor-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    sources = [str(VENDORS / package) for package in packages]
    command = [sys.executable, "-m", "pip", *PIP, "--target", str(target), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@functools.cache
def driver_library(site: Path) -> Path:
    """Return the driver library, after compiling it if this is its first use with this torch."""
    done = subprocess.run(
        [sys.executable, "-m", "simchip.build"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.strip())
