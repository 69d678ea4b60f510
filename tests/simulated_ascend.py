"""A machine with simulated Ascend chips: the files, tools and variables that a real one has.

The chips are tests/simulated.py's, named npu; the tree and npu-smi's text are what the Ascend
backend of mst reads before torch is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.simulated import npu_environment

RECORDED = Path(__file__).parent / "data/npu_smi/910b3_24.1.rc1.txt"
TOOLKIT = "usr/local/Ascend/ascend-toolkit/latest"


def ascend_environment(root: Path, devices: int = 2, **more: str) -> dict[str, str]:
    """Return the environment of a shell on a machine with up to four 910B3.

    Args:
        root: an empty directory; the machine's files are written there.
        devices: chips.
        more: other variables; they win.
    """
    for folder in ("lib64", "opp", "runtime", "compiler"):
        (root / TOOLKIT / folder).mkdir(parents=True)
    (root / TOOLKIT / "lib64/libhccl.so").touch()
    (root / TOOLKIT / "../set_env.sh").touch()
    (root / "usr/local/Ascend/driver").mkdir()
    (root / "usr/local/Ascend/driver/version.info").write_text("Version=24.1.rc1\n")
    (root / "dev").mkdir()
    for name in ("davinci_manager", *(f"davinci{index}" for index in range(devices))):
        (root / "dev" / name).touch()
    tool = root / "usr/local/bin/npu-smi"
    tool.parent.mkdir()
    # A card is three lines of the table, after a head of seven.
    tool.write_text(f'#!/bin/sh\n[ "$#" = 1 ] && head -n {7 + 3 * devices - 1} "{RECORDED}"\n')
    tool.chmod(0o755)
    variables = {
        "PATH": os.pathsep.join([str(tool.parent), os.environ["PATH"]]),
        "MST_ASCEND_ROOT": str(root),
        "ASCEND_HOME_PATH": str(root / TOOLKIT),
        "ASCEND_OPP_PATH": str(root / TOOLKIT / "opp"),
        "LD_LIBRARY_PATH": str(root / TOOLKIT / "lib64"),
    }
    return npu_environment(devices=devices, memory_bytes=8 * 2**30) | variables | more
