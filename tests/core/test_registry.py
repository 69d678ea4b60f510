"""The registry: one broken vendor is reported, and the rest run."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from mst.errors import UsageError
from mst.registry import PluginError, PluginRecord, guarded, load

VENDORS = Path(__file__).parents[1] / "vendor"
BACKEND = """
from mst.facts import Capabilities, Probe
from mst.hookspecs import hookimpl

@hookimpl
def mst_backend_name():
    return "{name}"

@hookimpl
def mst_probe():
    return Probe(found=False, usable=False, reason="from {name}")

@hookimpl
def mst_capabilities():
    return Capabilities("{name}", "gloo")
"""
Install = Callable[..., EntryPoint]
_numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a package on the path and returns its entry point."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(distribution: str, name: str, source: str) -> EntryPoint:
        module = f"mst_vendor_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(source)
        site = tmp_path / module
        info = site / f"{distribution.replace('-', '_')}-2.1.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.1\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(f"[mst]\n{name} = {module}\n")
        (found,) = importlib.metadata.distributions(path=[str(site)])
        (point,) = found.entry_points
        return point

    return put


def test_a_vendors_backend_is_loaded_with_its_origin(install: Install) -> None:
    point = install("acme-mst", "acme", BACKEND.format(name="acme"))

    registry = load([point])

    hooks = ("mst_backend_name", "mst_capabilities", "mst_probe")
    assert registry.records == (
        PluginRecord("acme", "acme-mst", "2.1", ("backend",), "ok", "", hooks),
    )
    assert registry.backends["acme"].mst_probe().reason == "from acme"
    assert registry.exports == {}


def test_the_built_in_backend_is_found_by_its_entry_point() -> None:
    record = next(record for record in load().records if record.name == "cpu")

    assert (record.distribution, record.status) == ("mst-train", "ok")
    assert "mst_environment" in record.hooks


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import no_such_driver", "No module named 'no_such_driver'"),
        ("def :", "SyntaxError: invalid syntax"),
        ("def mst_probe(): ...", "implements no mst hook"),
        (BACKEND.format(name="x").replace("mst_probe", "mst_prob"), "unknown hook 'mst_prob'"),
        (
            BACKEND.format(name="x").replace("mst_probe()", "mst_probe(depth)"),
            "{'depth'} are declared in the hookimpl but can not be found in the hookspec",
        ),
        (
            BACKEND.format(name="x").partition("@hookimpl\ndef mst_probe")[0],
            "implements part of the backend hooks; without mst_probe, mst_capabilities",
        ),
        (
            "from mst.hookspecs import hookimpl\n@hookimpl\ndef mst_export_name(): return 'x'",
            "implements part of the export hooks; without mst_export",
        ),
        (BACKEND.replace('"{name}"', "7", 1), "mst_backend_name returned int 7, not str"),
        (BACKEND.format(name="My Chip"), "mst_backend_name returned 'My Chip'"),
        (BACKEND.format(name="auto"), "mst_backend_name returned 'auto'"),
        (BACKEND.format(name="cuda:0"), "mst_backend_name returned 'cuda:0'"),
    ],
)
def test_a_broken_plugin_is_recorded_and_the_rest_run(
    install: Install, source: str, reason: str
) -> None:
    broken = install("aaa-broken", "broken", source)
    healthy = install("zzz-acme", "acme", BACKEND.format(name="acme"))

    registry = load([broken, healthy])

    first, second = registry.records
    assert (first.name, first.distribution, first.version) == ("broken", "aaa-broken", "2.1")
    assert first.status == "failed"
    assert reason in first.reason
    assert "\n" not in first.reason
    assert second.status == "ok"
    assert list(registry.backends) == ["acme"]


def test_a_missing_module_is_recorded() -> None:
    (record,) = load([EntryPoint("gone", "mst_no_such_module", "mst")]).records

    assert (record.status, record.distribution, record.version) == ("failed", "", "")
    assert "mst_no_such_module" in record.reason


def test_an_import_that_hangs_is_given_up(install: Install) -> None:
    slow = install("aaa-slow", "slow", "import time\ntime.sleep(600)")
    healthy = install("zzz-acme", "acme", BACKEND.format(name="acme"))

    started = time.monotonic()
    registry = load([slow, healthy], seconds=0.5)

    assert time.monotonic() - started < 10
    assert registry.records[0].reason == "did not answer in 0.5 s"
    assert list(registry.backends) == ["acme"]


def test_the_built_in_keeps_its_backend_name(install: Install) -> None:
    clone = install("aaa-clone", "fastcpu", BACKEND.format(name="cpu"))
    built_in = install("mst-train", "cpu", BACKEND.format(name="cpu"))

    registry = load([clone, built_in])

    assert [record.distribution for record in registry.records] == ["mst-train", "aaa-clone"]
    refused = registry.records[1]
    assert (refused.status, refused.kinds) == ("refused", ("backend",))
    assert refused.reason == (
        "backend name 'cpu' of aaa-clone is taken by mst-train; uninstall one of the two"
    )


def test_of_two_entry_points_with_one_name_the_first_distribution_wins(install: Install) -> None:
    second = install("b-vendor", "acme", BACKEND.format(name="two"))
    first = install("A-vendor", "acme", BACKEND.format(name="one"))

    registry = load([second, first])

    assert [record.status for record in registry.records] == ["ok", "refused"]
    assert "b-vendor is taken by A-vendor" in registry.records[1].reason
    assert list(registry.backends) == ["one"]


def test_a_name_does_not_change_hands_when_its_owner_breaks(install: Install) -> None:
    owner = install("a-vendor", "acme", "raise RuntimeError('driver too old')")
    other = install("b-vendor", "acme", BACKEND.format(name="acme"))

    registry = load([owner, other])

    assert [record.status for record in registry.records] == ["failed", "refused"]
    assert registry.backends == {}


def test_a_refused_plugin_is_not_imported(install: Install, tmp_path: Path) -> None:
    mark = tmp_path / "imported"
    owner = install("a-vendor", "acme", BACKEND.format(name="acme"))
    other = install("b-vendor", "acme", f"open({str(mark)!r}, 'w').close()")

    load([owner, other])

    assert not mark.exists()


def test_a_wrapper_of_one_vendor_does_not_reach_another(install: Install) -> None:
    wrapper = BACKEND.format(name="nosy") + (
        "@hookimpl(wrapper=True, specname='mst_probe')\n"
        "def around():\n    yield\n    return 'stolen'\n"
    )
    nosy = install("a-nosy", "nosy", wrapper)
    healthy = install("b-acme", "acme", BACKEND.format(name="acme"))

    registry = load([nosy, healthy])

    assert registry.backends["nosy"].mst_probe() == "stolen"
    assert registry.backends["acme"].mst_probe().reason == "from acme"


def test_a_guarded_call_returns_its_answer_even_when_that_is_none() -> None:
    assert guarded(lambda: 7) == 7
    assert guarded(lambda: None) is None


def test_a_guarded_call_that_is_late_says_so() -> None:
    with pytest.raises(PluginError, match=r"did not answer in 0\.2 s"):
        guarded(lambda: time.sleep(600), seconds=0.2)


def test_what_a_plugin_prints_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    guarded(lambda: print("loading firmware"))

    assert capsys.readouterr() == ("", "loading firmware\n")


def test_the_plugins_own_mst_error_is_kept() -> None:
    def fail() -> None:
        raise UsageError("--option bits=3 was asked for; 4 and 8 are there. Pass one of these.")

    with pytest.raises(UsageError, match="bits=3"):
        guarded(fail)


def test_ctrl_c_during_a_call_without_limit_is_the_users() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(interrupt, seconds=None)
    with pytest.raises(PluginError, match="KeyboardInterrupt"):
        guarded(interrupt)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the packages of tests/vendor for real, and return where they are."""
    target = tmp_path_factory.mktemp("site")
    packages = [str(VENDORS / name) for name in ("acme", "acme_copy", "broken", "mistyped", "slow")]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, *packages],
        check=True,
        capture_output=True,
    )
    return target


def run_with(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these packages installed."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )


def test_real_vendor_packages_are_loaded_or_reported(site: Path) -> None:
    code = (
        "import json; from dataclasses import asdict; from mst.registry import load;"
        "from mst.probe import backend_environment, machine_facts; from mst.serial import to_json;"
        "registry = load(); facts = machine_facts(registry, seconds=1.5);"
        "acme = next(one for one in facts.backends if one.name == 'acme');"
        "environment = backend_environment(registry, 'acme', acme.probe.devices);"
        "records = [asdict(one) for one in registry.records];"
        "print(json.dumps([records, to_json(facts), environment]))"
    )
    started = time.monotonic()
    child = run_with(site, "-c", code)

    # The slow vendor sleeps for ten minutes; neither the answer nor the exit waits for it.
    assert time.monotonic() - started < 60
    records, facts, environment = json.loads(child.stdout)
    by_package: dict[str, Any] = {record["distribution"]: record for record in records}
    assert {name: record["status"] for name, record in by_package.items()} == {
        "mst-train": "ok",
        "mst-acme": "ok",
        "mst-acme-copy": "refused",
        "mst-broken": "failed",
        "mst-mistyped": "failed",
        "mst-slow": "ok",
    }
    assert by_package["mst-acme"]["version"] == "1.2.0"
    assert "mst-acme-copy is taken by mst-acme" in by_package["mst-acme-copy"]["reason"]
    assert "libbroken.so: cannot open" in by_package["mst-broken"]["reason"]
    assert "{'timeout'}" in by_package["mst-mistyped"]["reason"]
    reports = {report["name"]: report for report in facts["backends"]}
    assert list(reports) == ["ascend", "cpu", "cuda", "acme", "slow"]
    assert reports["acme"]["capabilities"][0]["torch_device"] == "acmedev"
    assert reports["acme"]["health"] == ["the fan of Acme One is slow: clean it"]
    assert reports["slow"]["probe"]["reason"] == "mst_probe: did not answer in 1.5 s"
    assert environment == {"ACME_VISIBLE_DEVICES": "0"}


def test_the_plugins_command_prints_json_whatever_a_vendor_prints(site: Path) -> None:
    child = run_with(site, "-m", "mst", "plugins", "--json")

    plugins = json.loads(child.stdout)["plugins"]
    assert [one["name"] for one in plugins if one["status"] != "ok"] == [
        "acme",
        "broken",
        "mistyped",
    ]
    assert "loading libbroken.so" in child.stderr
