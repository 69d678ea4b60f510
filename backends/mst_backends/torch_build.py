"""Whether the installed torch can drive a card, told from its files without importing it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

INSTALL = "https://pytorch.org/get-started/locally"
# The least driver for each major version of CUDA. From the CUDA Toolkit release notes, "CUDA
# Toolkit and Minimum Required Driver Version for CUDA Minor Version Compatibility", Linux, and
# docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.
LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}
# docs.nvidia.com/datacenter/tesla/drivers/cuda-toolkit-driver-and-architecture-matrix.html: the
# last CUDA for Maxwell, Pascal and Volta is 12.x, the first for Blackwell 12.8.
FIRST_CAPABILITY_OF_CUDA_13 = (7, 5)
BLACKWELL = (10, 0)
FIRST_CUDA_OF_BLACKWELL = (12, 8)


@dataclass(frozen=True)
class TorchBuild:
    """The torch that is installed.

    Attributes:
        version: "2.13.0+cu126"; "" when torch is not installed.
        platform: what it is built for: "cuda", "rocm", "cpu", or "" when its files don't say.
        cuda: the CUDA it is built with, when platform is "cuda".
    """

    version: str
    platform: str = ""
    cuda: tuple[int, int] | None = None


def installed_torch() -> TorchBuild:
    """Return the torch that `import torch` would find."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return TorchBuild("")
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return TorchBuild("of unknown version")
    return parse_version_file(text)


def parse_version_file(text: str) -> TorchBuild:
    """Return what torch/version.py says, as in `cuda: Optional[str] = '12.6'`."""
    pairs = re.findall(r"^(\w+)\s*(?::[^=\n]*)?=\s*(.+?)\s*$", text, re.MULTILINE)
    values = {name: value.strip("'\"") for name, value in pairs}
    version = values.get("__version__", "of unknown version")
    cuda = re.match(r"(\d+)\.(\d+)", values.get("cuda", ""))
    if cuda:
        return TorchBuild(version, "cuda", (int(cuda[1]), int(cuda[2])))
    if values.get("cuda") != "None":
        return TorchBuild(version)
    return TorchBuild(version, "cpu" if values.get("hip", "None") == "None" else "rocm")


def build_fault(build: TorchBuild) -> str:
    """Return why this torch drives no NVIDIA card at all, or ""."""
    if not build.version:
        return "torch is not installed: python -m pip install torch"
    if build.platform in ("cpu", "rocm"):
        other = "" if build.platform == "cpu" else ", it is built for ROCm"
        return f"torch {build.version} has no CUDA{other}: install the CUDA build ({INSTALL})"
    return ""


def driver_fault(build: TorchBuild, driver: str, newest_cuda: tuple[int, int] | None) -> str:
    """Return why this driver is too old for this torch, or "".

    Args:
        build: the installed torch.
        driver: version of the driver, "" when unknown.
        newest_cuda: the newest CUDA that the driver library runs, where known. It counts more
            than the driver's version: NVIDIA's cuda-compat packages raise it.
    """
    if build.cuda is None or not driver:
        return ""
    major = build.cuda[0]
    least = LEAST_DRIVER.get(major, "")
    if newest_cuda is not None:
        old = newest_cuda[0] < major
    else:
        old = bool(least) and numbers(driver) < numbers(least)
    if not old:
        return ""
    wanted = f"{least} or newer" if least else f"one for CUDA {major}"
    return (
        f"driver {driver} is too old for torch {build.version}, which wants {wanted}: "
        f"upgrade the driver, or install a torch for an older CUDA ({INSTALL})"
    )


def kernel_fault(build: TorchBuild, capability: tuple[int, int] | None) -> str:
    """Return why this torch has no kernels for such a card, or ""."""
    if build.cuda is None or capability is None:
        return ""
    arch = f"sm{capability[0]}{capability[1]}"
    if build.cuda >= (13, 0) and capability < FIRST_CAPABILITY_OF_CUDA_13:
        # torch's own builds for CUDA 12.8 and 12.9 left them out too: pytorch issue 157517.
        return (
            f"torch {build.version} has no kernels for {arch}, which CUDA 13 dropped: "
            f"install a torch for CUDA 12.6 ({INSTALL})"
        )
    if build.cuda < FIRST_CUDA_OF_BLACKWELL and capability >= BLACKWELL:
        return (
            f"torch {build.version} has no kernels for {arch}, which came with CUDA 12.8: "
            f"install a torch for CUDA 12.8 or newer ({INSTALL})"
        )
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparing: (525, 60, 13)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
