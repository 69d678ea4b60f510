"""pip, with environment markers read as on another machine.

pip's own `--python-version` and `--platform` choose wheels; "tomli; python_version < '3.11'" it
still judges by the Python that runs it (pypa/pip#11664). Run as a file, with the markers as JSON
before pip's own arguments.
"""

from __future__ import annotations

import json
import runpy
import sys


def main() -> None:
    """Run pip with what its vendored `packaging` says of this machine replaced."""
    from pip._vendor.packaging import markers

    target = json.loads(sys.argv.pop(1))
    if not callable(getattr(markers, "default_environment", None)):
        sys.exit("ERROR: this pip reads markers in another way than pip 22.2 to 26 do")
    markers.default_environment = lambda: dict(target)  # pip changes what it gets
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
