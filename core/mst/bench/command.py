"""A command of mst that ends with who measures it: `python -m mst.bench.command train …`."""

from __future__ import annotations

import sys

from mst.cli import main
from mst.worker_process import die_with_parent

if __name__ == "__main__":
    # Else a bench that is killed, or a node that Ray gives up, leaves its run on the device.
    die_with_parent()
    sys.exit(main())
