"""`mst plugins check` of a serving engine: what it promises is tried, and a talkative one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mst.conformance.serving_engine import CHECKS

pytestmark = pytest.mark.slow


def checked(name: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, "-m", "mst", "plugins", "check", name, "--json"],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, {each["id"]: each for each in json.loads(done.stdout)}


def test_an_engine_is_started_and_one_that_logs_prompts_fails(parrot_site: Path) -> None:
    code, found = checked("parrot", PYTHONPATH=str(parrot_site))
    status = {name: each["status"] for name, each in found.items()}

    assert code == 1
    assert [*found] == [check for check, *_ in CHECKS]
    assert status.pop("engine.quiet") == "fail"
    assert set(status.values()) == {"pass"}


def test_an_engine_that_is_not_installed_is_tried_as_far_as_it_goes(tmp_path: Path) -> None:
    code, found = checked("lmdeploy", XDG_DATA_HOME=str(tmp_path))

    assert code == 0
    assert [each["status"] for each in found.values()] == ["pass"] * 3 + ["skip"] * 5
