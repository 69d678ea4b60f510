"""The process that multiplies: `mst bench peak` starts it with the device's environment."""

from __future__ import annotations

import json
import sys

from mst.bench.peak import product_tflops
from mst.errors import MstError


def main(arguments: list[str]) -> int:
    """Print what was measured as one line of JSON."""
    asked = json.loads(arguments[0])
    try:
        tflops = product_tflops(asked)
    except MstError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({**asked, "tflops": round(tflops, 6)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
