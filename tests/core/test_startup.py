"""What a person types to look around must not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "numpy", "sklearn", "matplotlib")


@pytest.mark.parametrize(
    "command",
    ["--help", "devices", "plugins", "plan --help", "train --help", "runs --help", "bench --help"],
)
def test_no_framework_is_loaded(command: str) -> None:
    code = (
        "import sys\nfrom mst.cli import main\n"
        "try:\n code = main(sys.argv[1:])\nexcept SystemExit as error:\n code = error.code\n"
        f"sys.exit(code or ','.join(set({HEAVY!r}) & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
