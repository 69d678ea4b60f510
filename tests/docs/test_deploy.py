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


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, with lines that go on put together."""
    lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(found[0], found[1]) for line in joined if len(found := line.split(" ", 1)) == 2]


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cpu", "Dockerfile.cuda"])
def test_the_containers_command_parses(file: str) -> None:
    found = dict(instructions(file))
    name, args = parsed(shlex.join([*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]))

    assert (name, args.target, args.socket) == ("serve", "/model", "/run/mst/serve.sock")


@pytest.mark.parametrize("device", ["cpu", "cuda", "ascend"])
def test_an_image_is_made_of_a_bundle_for_its_device_and_asks_no_index(device: str) -> None:
    file = f"Dockerfile.{device}"
    steps = instructions(file)
    runs = [rest for name, rest in steps if name == "RUN"]
    install = next(rest for rest in runs if "install.py" in rest)
    made = re.search(r"`(mst bundle create .*?)`", (DEPLOY / file).read_text(encoding="utf-8"))

    assert made is not None
    assert parsed(made[1])[1].device == device
    assert parsed(made[1])[1].python == "3.11"
    assert install.startswith("--mount=type=bind,source=bundle,target=/bundle ")
    assert "--to /opt/mst/.venv" in install
    assert not [rest for rest in runs if "pip" in rest or "http" in rest]
    assert ("USER", "mst") in steps
    assert [name for name, _ in steps][-2:] == ["ENTRYPOINT", "CMD"]


def test_the_ascend_image_hands_its_arguments_on(tmp_path: Path) -> None:
    entry = json.loads(dict(instructions("Dockerfile.ascend"))["ENTRYPOINT"])
    (tmp_path / "set_env.sh").write_text("CANN=here\n", encoding="utf-8")
    (tmp_path / "mst").write_text('#!/bin/sh\nprintf "%s|" "$@"\n', encoding="utf-8")
    (tmp_path / "mst").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CANN_SET_ENV": f"{tmp_path}/set_env.sh"}
    done = subprocess.run(
        [*entry, "train", "--model", "a b"], env=environ, capture_output=True, text=True, check=True
    )

    assert done.stdout == "train|--model|a b|"


def test_the_apparmor_profile_is_parsed() -> None:
    if shutil.which("apparmor_parser") is None:
        pytest.skip("wants apparmor_parser")
    profile = str(DEPLOY / "mst.apparmor")
    done = subprocess.run(
        ["apparmor_parser", "--skip-kernel-load", "--skip-cache", profile],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    # Where the kernel has no AppArmor, it says on standard error that it has no cache.
    assert done.returncode == 0, done.stderr


def test_the_selinux_policy_is_built(tmp_path: Path) -> None:
    makefile = Path("/usr/share/selinux/devel/Makefile")
    if not makefile.is_file():
        pytest.skip("wants selinux-policy-dev")
    for name in ("mst.te", "mst.fc"):
        shutil.copy(DEPLOY / name, tmp_path)
    done = subprocess.run(
        ["make", "-f", str(makefile), "mst.pp"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mst.pp").stat().st_size > 0


def test_models_are_read_only_to_the_service() -> None:
    assert settings()["ReadOnlyPaths"] == "-/srv/models"
    assert "/srv/models/** r," in (DEPLOY / "mst.apparmor").read_text(encoding="utf-8")
