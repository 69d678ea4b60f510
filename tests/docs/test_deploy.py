"""What `docs/deploy` gives is what systemd and `mst serve` understand."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.test_docs import ROOT, parsed

from mst.serve.http.limits import Limits

DEPLOY = ROOT / "docs" / "deploy"
UNIT = (DEPLOY / "mst-serve.service").read_text(encoding="utf-8")


def settings() -> dict[str, str]:
    return dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line and line[0] != "#")


def test_the_units_command_parses() -> None:
    program, *arguments = shlex.split(settings()["ExecStart"])
    name, args = parsed(shlex.join(["mst", *arguments]))

    assert Path(program).name == "mst"
    assert (name, args.api_keys) == ("serve", "require")
    assert int(settings()["TimeoutStopSec"]) > Limits().grace_seconds


def test_the_unit_leaves_the_jail_what_it_is_made_of() -> None:
    assert not {"RestrictNamespaces", "SystemCallFilter", "PrivateUsers"} & settings().keys()


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("wants systemd-analyze")
    unit = tmp_path / "mst-serve.service"
    unit.write_text(UNIT.replace("/opt/mst/.venv/bin/mst", sys.executable), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )

    assert str(unit.name) not in done.stderr, done.stderr
    assert done.returncode == 0


def test_the_containers_command_parses() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    entry, command = (
        json.loads(found[1])
        for each in ("ENTRYPOINT", "CMD")
        if (found := re.search(rf"^{each} (\[.*\])$", text, re.MULTILINE))
    )
    name, args = parsed(shlex.join([*entry, *command]))

    assert (name, args.target, args.socket) == ("serve", "/model", "/run/mst/serve.sock")
