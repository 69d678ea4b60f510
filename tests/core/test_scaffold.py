"""A new vendor package installs, fails where it should, and passes once it is filled in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tests.simulated import PIP, simchip_environment

from mst import cli
from mst.conformance.checks import CHECKS
from mst.errors import EXIT_FAILED, EXIT_USAGE
from mst.registry import load
from mst.scaffold import names_of, texts, write_package

LIGHT = "loading,probe,facts,environment,activation"
# What a vendor puts in, for a chip that is simchip under the name of mychip; <dev> is made for it.
FILLED_IN = {
    'NODES, NODE = Path("/dev"), "mychip"': 'NODES, NODE = Path("<dev>"), "mychip"',
    'EXTENSION, TORCH_DEVICE = "torch_mychip", "mychip"': (
        'EXTENSION, TORCH_DEVICE = "simchip", "mychip"'
    ),
    'VISIBLE = "MYCHIP_VISIBLE_DEVICES"': 'VISIBLE = "SIMCHIP_VISIBLE_DEVICES"',
    "importlib.import_module(EXTENSION)": "importlib.import_module(EXTENSION).load(TORCH_DEVICE)",
    'distributed_backend="gloo"': 'distributed_backend="simccl"',
    'strategies=("single",)': 'strategies=("single", "ddp")',
    'attention=("eager",)': 'attention=("sdpa", "eager")',
    'name="mychip",': 'name="MyChip 1",',
    'arch="unknown",': 'arch="mc1",',
    "memory_total_bytes=None,": "memory_total_bytes=4 * 2**30,",
    'dtypes=("float32",)': 'dtypes=("bfloat16", "float16", "float32")',
    "sources={}": 'sources={"memory_total_bytes": "table: MyChip 1 data sheet, page 3"}',
}
PRESENT = {key: FILLED_IN[key] for key in list(FILLED_IN)[:1]}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the package that `mst backend new mychip` writes."""
    target = tmp_path_factory.mktemp("vendor") / "mst-mychip"
    assert cli.main(["backend", "new", "mychip", "--output-dir", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def installed(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in which pip has installed the package."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", *PIP, "--target", str(site), str(package)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture
def site(installed: Path, tmp_path: Path) -> Path:
    """Return a copy of the installation, whose module a test may edit."""
    return Path(shutil.copytree(installed, tmp_path / "site"))


def fill_in(site: Path, changes: Mapping[str, str], devices: int = 2) -> str:
    """Edit the installed module as a vendor does who has device files; returns its text."""
    dev = site / "dev"
    dev.mkdir()
    for number in range(devices):
        (dev / f"mychip{number}").touch()
    module = site / "mst_mychip.py"
    text = module.read_text(encoding="utf-8")
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after.replace("<dev>", str(dev)))
    module.write_text(text, encoding="utf-8")
    return text


def plugged_in(site: Path) -> dict[str, str]:
    """Return an environment with the package, and simchip's driver under the name of mychip."""
    environment = simchip_environment(devices=2, SIMCHIP_NAME="mychip")
    path = os.pathsep.join([str(site), environment["PYTHONPATH"]])
    return {**environment, "PYTHONPATH": path}


def mst(
    site: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `mst` with the package installed."""
    environ = environment or {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-m", "mst", *arguments],
        env={**environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=500,
    )


def kit(
    site: Path, *options: str, environment: Mapping[str, str] | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the conformance kit; returns its exit code, and each check by its id."""
    output = site / "report.json"
    command = ("backend", "check", "mychip", "--output", str(output), *options)
    done = mst(site, *command, environment=environment)
    assert output.exists(), done.stdout + done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    return done.returncode, {one["id"]: one for one in report["checks"]}


def failures(checks: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    return {id: one["found"] for id, one in checks.items() if one["status"] == "fail"}


def test_the_new_package_is_installed_and_listed(installed: Path) -> None:
    done = mst(installed, "plugins", "--json")
    records = {one["name"]: one for one in json.loads(done.stdout)["plugins"]}

    assert records["mychip"]["status"] == "ok", records["mychip"]
    assert records["mychip"]["distribution"] == "mst-mychip"
    assert records["mychip"]["kinds"] == ["backend"]


def test_without_a_chip_the_devices_say_so(installed: Path) -> None:
    done = mst(installed, "devices")

    assert done.returncode == 0, done.stderr
    assert "mychip: not found: no /dev/mychip*: no chip, its driver is not loaded" in done.stdout


def test_the_kits_first_failure_is_the_missing_device(installed: Path) -> None:
    code, checks = kit(installed)

    assert code == EXIT_FAILED
    assert list(failures(checks)) == ["probe.answers"]
    assert failures(checks)["probe.answers"].startswith("no usable device: no /dev/mychip*")
    assert checks["activation.repeats"]["status"] == "skip"


def test_with_a_device_file_the_extension_is_what_is_missing(site: Path) -> None:
    fill_in(site, PRESENT)
    devices = mst(site, "devices", "--json")
    reports = {one["name"]: one["probe"] for one in json.loads(devices.stdout)["backends"]}
    _, checks = kit(site, "--only", LIGHT)

    assert (reports["mychip"]["found"], reports["mychip"]["usable"]) == (True, False)
    assert len(reports["mychip"]["devices"]) == 2
    assert failures(checks) == {
        "probe.answers": "no usable device: torch_mychip is not installed:"
        " say here how to install it"
    }


def test_a_user_who_hides_all_chips_is_told(site: Path) -> None:
    fill_in(site, PRESENT)
    environment = {**os.environ, "PYTHONPATH": str(site), "MYCHIP_VISIBLE_DEVICES": "7"}
    done = mst(site, "devices", environment=environment)

    assert "MYCHIP_VISIBLE_DEVICES='7' hides all chips: unset it" in done.stdout


@pytest.mark.slow
def test_filled_in_it_passes_the_kit_and_stays_short(site: Path) -> None:
    text = fill_in(site, FILLED_IN)
    # What these two ask is the chip's, and simchip passes them in test_conformance.
    left_out = ("training.low_precision", "training.resume")
    only = ",".join(check.id for check in CHECKS if check.id not in left_out)
    code, checks = kit(site, "--only", only, environment=plugged_in(site))

    assert failures(checks) == {}
    assert code == 0
    assert checks["training.losses"]["status"] == "pass"
    assert checks["activation.second"]["status"] == "pass"
    assert "SIMCHIP_VISIBLE_DEVICES" in checks["environment.text"]["found"]
    assert len(text.splitlines()) < 150


def test_the_packages_own_test_is_the_kit(installed: Path, package: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "probe.answers"],
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=package,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert "no usable device: no /dev/mychip*" in done.stdout
    assert "1 failed" in done.stdout


def test_the_three_commands_to_type_next_name_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["backend", "new", "mychip", "--output-dir", "my chips/one"]) == 0
    out = capsys.readouterr().out
    commands = [line.strip() for line in out.splitlines() if line.startswith("  ")]

    assert commands == [
        "python -m pip install --no-deps -e './my chips/one'",
        "mst devices",
        "mst backend check mychip",
    ]
    assert Path("my chips/one/mst_mychip.py").is_file()


@pytest.mark.parametrize("name", ["x", "my-chip", "npu2_a"])
def test_every_name_that_is_accepted_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = names_of(name, {})
    write_package(names, tmp_path / "package")
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    registry = load([EntryPoint(name, names.module, "mst")])

    assert [record.reason for record in registry.records] == [""]
    assert list(registry.backends) == [name]
    assert registry.backends[name].mst_probe().reason.startswith(f"no /dev/{names.identifier}*")
    assert not any("$" in text for text in texts(names).values())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MyChip", "a name is lower-case letters and digits"),
        ("9chip", "begins with a letter"),
        ("auto", "is not 'auto'"),
        ("chip-", "single '-' or '_' between them"),
        ("a--b", "single '-' or '_' between them"),
        ("../chip", "a name is lower-case letters and digits"),
        ("", "a name is lower-case letters and digits"),
        ("chip\n", "a name is lower-case letters and digits"),
        ("cpu", "the name is taken by mst-train"),
        ("train", "a package mst-train is installed here already"),
        ("plugins", "a module mst_plugins is installed here already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["backend", "new", name, "--output-dir", str(tmp_path / "package")])

    assert code == EXIT_USAGE
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code = cli.main(["backend", "new", "mychip", "--output-dir", str(tmp_path)])
    file = cli.main(["backend", "new", "mychip", "--output-dir", str(tmp_path / "notes.txt")])
    err = capsys.readouterr().err

    assert (code, file) == (EXIT_USAGE, EXIT_USAGE)
    assert "is not empty, and nothing in it will be replaced" in err
    assert "notes.txt is no directory" in err
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_directory_is_filled_unless_one_stands_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    monkeypatch.chdir(target)
    inside = cli.main(["backend", "new", "mychip", "--output-dir", "."])
    monkeypatch.chdir(tmp_path)
    outside = cli.main(["backend", "new", "mychip", "--output-dir", "empty"])

    assert (inside, outside) == (EXIT_USAGE, 0)
    assert "is the current directory" in capsys.readouterr().err
    assert (target / "pyproject.toml").is_file()


def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nobody can make a directory in /proc, not even root.
    read_only = cli.main(["backend", "new", "mychip", "--output-dir", "/proc/mst-mychip"])
    # The third file's name is too long, when two are written already.
    target = tmp_path / "package"
    too_long = cli.main(["backend", "new", "x" * 300, "--output-dir", str(target)])
    err = capsys.readouterr().err

    assert (read_only, too_long) == (EXIT_FAILED, EXIT_FAILED)
    assert "--output-dir /proc/mst-mychip cannot be written: No such file or directory" in err
    assert "File name too long" in err
    assert list(tmp_path.iterdir()) == []


def test_the_module_explains_each_hook_within_its_length(package: Path) -> None:
    text = (package / "mst_mychip.py").read_text(encoding="utf-8")
    hooks = re.findall(r'@hookimpl\ndef (mst_\w+)\(.*\n    """', text)

    assert len(text.splitlines()) < 120
    assert hooks == [
        "mst_backend_name",
        "mst_probe",
        "mst_capabilities",
        "mst_environment",
        "mst_activate",
        "mst_health",
    ]
