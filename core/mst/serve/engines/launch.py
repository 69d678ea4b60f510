"""Run as `python -m mst.serve.engines.launch PROGRAM [ARGUMENT…]`: becomes the engine.

The engine gets SIGTERM from the kernel when the server that has started it dies, however it dies.
"""

from __future__ import annotations

import os
import sys

from mst.worker_process import die_with_parent


def main(argv: list[str]) -> int:
    """Become the program that the arguments name."""
    die_with_parent()
    # What led to mst's own packages must not lead the engine to them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        print(f"{argv[0]} can't be started: {error.strerror}.", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
