"""An air-gap kit from end to end: made, verified, installed without a network, and trained there.

`python -m benchmarks.air_gap_kit [--wheels DIR] [--steps 4]` makes a bundle for this machine's CPU
and Python with the embedded model, installs it with an empty home in a network namespace that has
no way out, and runs the demo for some steps in it. Prints one JSON line: sizes and seconds.
Without `--wheels`, pip gets the wheels as it is set up here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mst
from mst.bundle.install import MANIFEST
from mst.rundir import now

# A network namespace of its own, with loopback down: nothing leads out of it.
OFF_NETWORK = ("unshare", "--map-root-user", "--net")


def run(command: list[str], cwd: Path, environ: dict[str, str]) -> float:
    """Run a command whose output goes to standard error; return its seconds."""
    began = time.monotonic()
    subprocess.run(command, cwd=cwd, env=environ, stdout=sys.stderr, check=True)
    return round(time.monotonic() - began, 1)


def kit(work: Path, wheels: str | None, steps: int) -> dict[str, Any]:
    """Return the figures of one kit, made below a directory."""
    mst_here = [sys.executable, "-m", "mst"]
    here = dict(os.environ)
    home = work / "home"
    home.mkdir()
    alone = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "LANG": "C.UTF-8"}
    bundle = work / "bundle"
    key = work / "signing.key"
    run([*mst_here, "sign", "--generate-key", str(key)], work, here)
    asked = ["bundle", "create", "--device", "cpu", "--sign", str(key), "--out", str(bundle)]
    seconds = {"create": run([*mst_here, *asked, *_of(wheels)], work, here)}
    signed = ["--public-key", f"{key}.pub"]
    seconds["verify"] = run([*mst_here, "bundle", "verify", str(bundle), *signed], work, here)
    install = [*OFF_NETWORK, sys.executable, str(bundle / "install.py"), *signed]
    seconds["install"] = run(install, work, alone)
    train = [str(work / ".venv/bin/mst"), "train", "--device", "auto", "--max-steps", str(steps)]
    train += ["--label-accuracy", "off", "--val-size", "16", "--output-dir", str(work / "run")]
    seconds["train"] = run([*OFF_NETWORK, *train], work, alone)
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    metrics = (work / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, metrics) if "loss" in line]
    return {
        "wheels": len(manifest["packages"]),
        "torch": manifest["torch"]["version"],
        "bundle_bytes": _size(bundle),
        "installed_bytes": _size(work / ".venv"),
        "seconds": seconds,
        "steps": steps,
        "losses": [round(each, 4) for each in losses],
    }


def _size(directory: Path) -> int:
    return sum(each.lstat().st_size for each in directory.rglob("*") if not each.is_dir())


def _of(wheels: str | None) -> list[str]:
    return [] if wheels is None else ["--wheels", str(Path(wheels).absolute())]


def main() -> None:
    """Print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--wheels", metavar="DIR", help="take the wheels from there")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--machine", default="", help="words on the machine, for the record")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures = kit(Path(place), args.wheels, args.steps)
    about = {
        "created": now(), "mst": mst.__version__, "machine": args.machine,
        "python": platform.python_version(), "from": "wheels" if args.wheels else "pip's index",
    }  # fmt: skip
    print(json.dumps(about | figures))


if __name__ == "__main__":
    main()
