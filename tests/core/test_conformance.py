"""The conformance kit passes a healthy chip, and names what is wrong with each broken one."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.simulated import simchip_environment

from mst.conformance.checks import CHECKS, chosen, function_of
from mst.conformance.report import report_is_whole
from mst.conformance.training import loss_faults
from mst.errors import MstError, UsageError

BROKEN = Path(__file__).parents[1] / "vendor" / "broken_chips"
HOOKS = "loading,probe,facts,environment.text"


def kit(
    environment: Mapping[str, str], directory: Path, name: str, *options: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run `mst backend check` and return how it ended, and its report."""
    path = directory / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "mst", "backend", "check", name, "--output", str(path), *options],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done, json.loads(path.read_text("utf-8")) if path.exists() else {}


def installed(site: Path, distribution: str, entry_points: Mapping[str, str]) -> None:
    """Write what an installer leaves of a package that has these entry points."""
    info = site / f"{distribution.replace('-', '_')}-6.6.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 6.6\n"
    (info / "METADATA").write_text(metadata)
    lines = [f"{name} = {module}" for name, module in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[mst]", *lines, ""]))


@functools.cache
def simchip(devices: int = 1, bf16: bool = True) -> dict[str, str]:
    return simchip_environment(devices=devices, bf16=bf16)


def broken(site: Path, module: str, devices: int = 1) -> dict[str, str]:
    """Return an environment in which this module is simchip's plugin."""
    healthy = simchip(devices)
    # The first of two packages with one name on the path is the one that is installed.
    installed(site, "mst-simchip", {"simchip": module})
    path = os.pathsep.join([str(site), str(BROKEN), healthy["PYTHONPATH"]])
    return {**healthy, "PYTHONPATH": path}


def failures(report: Mapping[str, Any]) -> dict[str, str]:
    return {one["id"]: one["found"] for one in report["checks"] if one["status"] == "fail"}


# The plugin, which checks run, and the message of each that must fail; no other may.
HOOK_CASES: list[tuple[str, str, dict[str, str]]] = [
    (
        "raising_probe",
        HOOKS,
        {"probe.answers": r"mst_probe raised RuntimeError: firmware 3 is too old"},
    ),
    ("heavy_probe", "probe.light", {"probe.light": r"mst_probe imports .*\btorch\b"}),
    ("talking_probe", HOOKS, {"probe.quiet": r"printed 'searching for chips.* standard output"}),
    ("homesick_probe", HOOKS, {"probe.survives": r"^mst_probe raised KeyError: 'HOME'$"}),
    ("moody_probe", HOOKS, {"probe.repeats": r"1 devices, then 2"}),
    ("unusable", HOOKS, {"probe.answers": r"driver 1\.0 is too old: install 2\.0"}),
    (
        "wrong_type",
        HOOKS,
        {"facts.typed": r"memory_total_bytes is str '4 GiB', not int"},
    ),
    ("no_source", HOOKS, {"facts.sources": r"simchip:0: memory_total_bytes has no source"}),
    (
        "wrong_unit",
        HOOKS,
        {"facts.plausible": r"memory_total_bytes is 4: bytes are meant; .*free_bytes is 8 of"},
    ),
    ("unknown_strategy", HOOKS, {"facts.capabilities": r"strategies has 'magic' \(known: ddp"}),
    ("failing_health", HOOKS, {"facts.health": r"mst_health: FileNotFoundError: /sys/class"}),
    (
        "unset_environment",
        HOOKS,
        {"environment.text": r"'SIMCHIP_VISIBLE_DEVICES', but mst_environment does not set it"},
    ),
    (
        "import_error",
        "loading,probe",
        {"loading.plugin": r"ImportError: libsimchip\.so\.2: cannot open shared object"},
    ),
]  # fmt: skip
SLOW_CASES: list[tuple[str, str, dict[str, str]]] = [
    ("slow_probe", "probe.fast", {"probe.fast": r"mst_probe took [2-4]\.\d s; it promises 2 s"}),
    ("wrong_memory", "memory.total", {"memory.total": r"8589934592 by the probe, 4294967296 by t"}),
    ("lying_stats", "memory", {"memory.counted": r"rose by 16777216 for a tensor of 33554432"}),
    ("leaking", "memory", {"memory.counted": r"33554432 bytes stay allocated after"}),
    ("plain_oom", "memory", {"memory.runs_out": r"raises RuntimeError \(simchip out of memory"}),
    ("boundless", "memory", {"memory.runs_out": r"were handed out: more than the device has"}),
    (
        "lying_dtypes",
        "dtypes.declared,operators.loss",
        {"dtypes.declared": r"declares bfloat16: .*RuntimeError"},
    ),
    (
        "nan_kernel",
        "operators.pointwise,operators.loss",
        {"operators.pointwise": r"^aten::silu: the result has NaN where the CPU has none$"},
    ),
    (
        "missing_operator",
        "operators.indexing",
        {"operators.indexing": r"^aten::gather: missing \(Could not run 'aten::gather'"},
    ),
    (
        "failing_operator",
        "operators.reductions",
        {"operators.reductions": r"^aten::cumsum: raises RuntimeError: "},
    ),
    (
        "wrong_product",
        "operators.products",
        {"operators.products": r"aten::mm: wrong value: the result is off by 0\.001 of"},
    ),
    (
        "wrong_gradient",
        "operators.pointwise",
        {"operators.pointwise": r"^aten::tanh: wrong value: the gradient of input 0 is off by"},
    ),
    (
        "crashing_kernel",
        "operators.pointwise,operators.loss",
        {"operators.pointwise": r"crashed \(SIGSEGV\) in operators\.pointwise, at aten::silu"},
    ),
    ("unseeded", "seeding", {"seeding.repeats": r"torch\.manual_seed\(7\) twice gives different"}),
    ("forgetful", "seeding", {"seeding.state": r"what is drawn after set_rng_state differs"}),
    (
        "impatient",
        "timing.synchronize",
        {"timing.synchronize": r"came \d{3,} ms after sync"},
    ),
    (
        "inexact_copies",
        "checkpoint.returns",
        {"checkpoint.returns": r"float32 saved on simchip:0 differs when loaded on the CPU"},
    ),
    (
        "modest_peak",
        "timing.product",
        {"timing.product": r"float32 product is faster than its declared peak .*synchronize\(\)"},
    ),
    (
        "boasting_peak",
        "timing.product",
        {"timing.product": r"float32 product reaches less than 1 % of peak_tflops .*not credible"},
    ),
    (
        "activates_once",
        "activation.repeats,operators.loss",
        {"activation.repeats": r"second mst_activate .*simchip is registered already"},
    ),
    (
        "activation_raises",
        "activation,operators.loss",
        {"activation.repeats": r"first mst_activate .*libsimchip\.so\.2: cannot open"},
    ),
]


@pytest.mark.parametrize(
    ("module", "only", "faults"), HOOK_CASES, ids=[case[0] for case in HOOK_CASES]
)
def test_broken_hooks_are_named(
    tmp_path: Path, module: str, only: str, faults: dict[str, str]
) -> None:
    devices = 2 if module == "moody_probe" else 1
    environment = broken(tmp_path / "site", module, devices)
    done, report = kit(environment, tmp_path, "simchip", "--only", only)

    assert done.returncode == 1, done.stdout + done.stderr
    _assert_named(report, faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "only", "faults"), SLOW_CASES, ids=[case[0] for case in SLOW_CASES]
)
def test_broken_chips_are_named(
    tmp_path: Path, module: str, only: str, faults: dict[str, str]
) -> None:
    done, report = kit(broken(tmp_path / "site", module), tmp_path, "simchip", "--only", only)

    assert done.returncode == 1, done.stdout + done.stderr
    _assert_named(report, faults)


def _assert_named(report: Mapping[str, Any], faults: Mapping[str, str]) -> None:
    found = failures(report)

    assert set(found) == set(faults), found
    for check, pattern in faults.items():
        assert re.search(pattern, found[check]), found[check]
    assert report["verdict"] == "fail"


def test_a_plugin_that_takes_another_ones_name_is_named(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "mst_simchip")
    installed(tmp_path / "site", "mst-simchip-copy", {"fork": "mst_simchip"})
    done, report = kit(environment, tmp_path, "simchip", "--only", "loading")

    assert done.returncode == 1
    assert "mst-simchip-copy is taken by mst-simchip" in failures(report)["loading.name"]
    assert set(failures(report)) == {"loading.name"}


@pytest.mark.slow
def test_a_probe_that_hangs_is_named(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "hanging_probe")
    done, report = kit(environment, tmp_path, "simchip", "--only", "probe.answers,probe.fast")

    assert done.returncode == 1
    _assert_named(
        report,
        {
            "probe.answers": r"mst_probe did not answer in 6 s",
            "probe.fast": r"mst_probe took 6\.\d s; mst gives it up after 5 s",
        },
    )


def test_a_device_that_torch_does_not_count_is_named(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "narrow_environment", devices=2)
    done, report = kit(environment, tmp_path, "simchip", "--only", "activation.torch")

    assert done.returncode == 1
    _assert_named(report, {"activation.torch": r"torch counts 1 devices; the probe says 2"})


def test_an_environment_that_does_not_narrow_is_named(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "wide_environment", devices=2)
    done, report = kit(environment, tmp_path, "simchip", "--only", "environment")

    assert done.returncode == 1
    _assert_named(
        report,
        {"environment.narrows": r"with SIMCHIP_VISIBLE_DEVICES='0,1' torch sees 2 devices, not 1"},
    )


@pytest.mark.slow
def test_an_activation_that_hangs_is_named_and_the_rest_skipped(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "activation_hangs")
    options = ("--only", "activation,operators.loss", "--time-limit", "4")
    done, report = kit(environment, tmp_path, "simchip", *options)

    assert done.returncode == 1
    _assert_named(
        report, {"activation.repeats": r"hangs: no end within 4 s in activation\.repeats"}
    )
    skipped = [one["found"] for one in report["checks"] if one["status"] == "skip"]
    assert set(skipped) == {"needs activation.repeats, which failed"}


@pytest.mark.slow
def test_collectives_that_corrupt_are_named(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "corrupting", devices=2)
    done, report = kit(environment, tmp_path, "simchip", "--only", "collectives")

    assert done.returncode == 1
    _assert_named(report, {"collectives.agree": r"rank 0: all_reduce: the sum is wrong"})


@pytest.mark.slow
def test_a_wrong_kernel_shows_in_the_losses_too(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "wrong_product")
    done, report = kit(environment, tmp_path, "simchip", "--only", "training.losses")

    assert done.returncode == 1
    _assert_named(report, {"training.losses": r"the loss of step \d is 5\.\d+, not 5\.\d+ \(off"})


@pytest.mark.slow
def test_a_chip_that_cannot_resume_is_named(tmp_path: Path) -> None:
    environment = broken(tmp_path / "site", "no_rng_state")
    done, report = kit(environment, tmp_path, "simchip", "--only", "training.resume")

    assert done.returncode == 1
    _assert_named(report, {"training.resume": r"--resume …` ended with exit code 1"})


@pytest.mark.slow
def test_a_healthy_chip_passes_everything(tmp_path: Path) -> None:
    done, report = kit(simchip(devices=2, bf16=False), tmp_path, "simchip")

    assert done.returncode == 0, done.stdout + done.stderr
    assert failures(report) == {}
    assert [one["id"] for one in report["checks"]] == [check.id for check in CHECKS]
    assert [one["id"] for one in report["checks"] if one["status"] == "skip"] == []
    assert (report["verdict"], report["signed_off"]) == ("pass", True)
    assert {"mst_simchip.py", "simchip/driver.py"} <= set(report["plugin"]["files"])
    assert report["plugin"]["distribution"] == "mst-simchip"
    assert report["facts"]["probe"]["devices"][0]["name"] == "SimChip v1"
    assert {"python", "torch", "transformers", "peft"} <= set(report["versions"])
    assert report_is_whole(tmp_path / "report.json")


@pytest.mark.slow
def test_the_cpu_passes_and_skips_are_counted_with_their_reason(tmp_path: Path) -> None:
    # Each trains and takes as long as all of the rest; they pass on a simulated chip above.
    left_out = ("training.low_precision", "training.resume")
    only = ",".join(check.id for check in CHECKS if check.id not in left_out)
    done, report = kit(os.environ, tmp_path, "cpu", "--only", only)
    skipped = {one["id"]: one["found"] for one in report["checks"] if one["status"] == "skip"}

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 failed, {len(skipped)} skipped" in done.stdout
    assert "keeps no account of the CPU's memory" in skipped["memory.counted"]
    assert "the CPU is the reference" in skipped["training.losses"]


def test_an_unknown_backend_is_wrong_usage(tmp_path: Path) -> None:
    done, report = kit(os.environ, tmp_path, "vaporware")

    assert (done.returncode, report) == (2, {})
    assert "UsageError: no backend 'vaporware' is installed here (installed: " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "operators.product"), "--only operators.product: there is no such check"),
        (("--time-limit", "0"), "--time-limit takes seconds above 0; found 0."),
        (("--output", "no/such/report.json"), "no/such cannot be written"),
    ],
)
def test_wrong_options_are_wrong_usage(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done, report = kit(os.environ, tmp_path, "cpu", *options)

    assert (done.returncode, report) == (2, {})
    assert message in done.stderr


def test_an_edited_report_is_detected(tmp_path: Path) -> None:
    done, report = kit(os.environ, tmp_path, "cpu", "--only", "facts", "--json")
    path = tmp_path / "report.json"
    verify = [sys.executable, "-m", "mst", "backend", "verify", str(path)]
    before = subprocess.run(verify, capture_output=True, text=True)
    whole = report_is_whole(path)
    report["checks"][0]["found"] = "better"
    path.write_text(json.dumps(report))
    after = subprocess.run(verify, capture_output=True, text=True)

    assert json.loads(done.stdout)["sha256"] == report["sha256"]
    assert whole
    assert (before.returncode, after.returncode) == (0, 1)
    assert "is whole: cpu, some checks only, pass" in before.stdout
    assert "was changed after it was written" in after.stdout
    assert not report_is_whole(path)


def test_what_is_no_report_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"status": "done"}')

    with pytest.raises(MstError, match=r"run\.json is no report of format 'mst-conformance-1'"):
        report_is_whole(path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_every_check_has_its_function_and_earlier_needs(check: Any) -> None:
    ids = [one.id for one in CHECKS]

    assert callable(function_of(check))
    assert ids.count(check.id) == 1
    assert all(ids.index(need) < ids.index(check.id) for need in check.needs)


def test_checks_are_chosen_by_id_and_by_subject() -> None:
    assert [one.id for one in chosen(["memory.total", "dtypes"])] == [
        "dtypes.declared",
        "memory.total",
        "dtypes.undeclared",
    ]
    assert chosen([]) == CHECKS
    with pytest.raises(UsageError, match="there is no such check"):
        chosen(["memory.tota"])


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ([5.0, 4.0], ""),
        ([5.00004, 4.0], ""),
        ([5.0, 4.0005], "the loss of step 2 is 4.000500, not 4.000000"),
        ([float("nan"), 4.0], "the loss of step 1 is nan"),
        ([5.0], "1 losses were written, not 2"),
    ],
)
def test_losses_are_compared_step_by_step(found: list[float], fault: str) -> None:
    assert "; ".join(loss_faults(found, [5.0, 4.0], 1e-5)).startswith(fault)
    assert bool(loss_faults(found, [5.0, 4.0], 1e-5)) == bool(fault)


def test_the_kit_runs_as_plain_pytest(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    command += ["--pyargs", "mst.conformance", "-k", "facts or narrows"]
    environment = broken(tmp_path / "site", "no_source")
    runs = [
        subprocess.run(
            command,
            env={**environment, "MST_BACKEND": name},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        for name in ("simchip", "cpu", "")
    ]

    assert [run.returncode for run in runs] == [1, 0, 1], runs[0].stdout + runs[1].stdout
    assert "1 failed, 5 passed" in runs[0].stdout
    assert "simchip:0: memory_total_bytes has no source" in runs[0].stdout
    assert "5 passed, 1 skipped" in runs[1].stdout
    assert "workers see every device" in runs[1].stdout
    assert "no backend is named: set MST_BACKEND=NAME" in runs[2].stdout


def test_every_check_is_documented_with_its_promise() -> None:
    text = (Path(__file__).parents[2] / "docs/conformance.md").read_text("utf-8")
    table = text.split("<!-- checks:begin -->")[1].split("<!-- checks:end -->")[0]
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", table, re.MULTILINE))

    assert rows == {check.id: check.title for check in CHECKS}
    chinese = (Path(__file__).parents[2] / "docs/conformance.zh-CN.md").read_text("utf-8")
    assert re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", chinese, re.MULTILINE) == re.findall(
        r"^\| `([a-z_]+\.[a-z_]+)` \|", text, re.MULTILINE
    )
