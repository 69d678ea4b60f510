"""CPU seconds that a command costs beyond `python -c pass`, and whether torch was loaded.

One JSON line a command. The limit that `tests/core/test_startup.py` holds is 0.15 s.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

COMMANDS = (["--help"], ["devices"], ["devices", "--json"], ["plan", "--help"], ["train", "--help"])
RUNS = 7
AFTER = "import sys; sys.argv[0] = 'mst'; from mst.cli import main; main(sys.argv[1:])"


def cpu_seconds(arguments: list[str]) -> float:
    """Return user plus system seconds of one Python process, its children included."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def loads_torch(command: list[str]) -> bool:
    """Return whether torch is among the modules once the command has run."""
    code = (
        "import sys\nfrom mst.cli import main\n"
        "try:\n main(sys.argv[1:])\nexcept SystemExit:\n pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], stdout=subprocess.DEVNULL)
    return done.returncode != 0


def main() -> None:
    """Measure each command beside the bare interpreter, in turn, and print the medians."""
    for command in COMMANDS:
        pairs = [
            (cpu_seconds(["-c", AFTER, *command]), cpu_seconds(["-c", "pass"])) for _ in range(RUNS)
        ]
        extra = statistics.median(ours - bare for ours, bare in pairs)
        line = {
            "case": "mst " + " ".join(command),
            "extra_cpu_seconds": round(extra, 4),
            "bare_cpu_seconds": round(statistics.median(bare for _, bare in pairs), 4),
            "torch_loaded": loads_torch(command),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
