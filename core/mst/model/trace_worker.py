"""Run as `python -m mst.model.trace_worker DIRECTORY`: print the built model's facts as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

from mst import serial
from mst.errors import ModelError
from mst.extensions import hide_extensions, hide_packages


def main(directory: Path) -> int:
    """Print the facts, or the reason why there are none, and return the exit code."""
    from mst.model.structure import build_on_meta, describe

    try:
        facts = describe(build_on_meta(directory)).facts
    except ModelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(serial.dumps(facts))
    return 0


if __name__ == "__main__":
    hide_extensions()
    hide_packages()
    sys.exit(main(Path(sys.argv[1])))
