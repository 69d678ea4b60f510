"""The commands that look at the machine: `mst devices`, `mst doctor`, `mst plugins`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from mst.cli import devices, doctor, plugins
from mst.facts import BackendReport, Capabilities, DeviceFacts, MachineFacts, Probe
from mst.registry import PluginRecord
from mst.serial import from_json

RAISES_HCCL = """
import os
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
    try:
        raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
    except ImportError as error:
        raise RuntimeError("Failed to load the backend extension: torch_npu.") from error
__version__ = "2.13.0"
"""
RAISES_OTHER_EXTENSION = RAISES_HCCL.replace("libhccl", "libacme").replace(
    "torch_npu", "torch_acme"
)


def run(command: ModuleType, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args(argv))
    return code


def break_torch(path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Put a package called torch before the real one, for subprocesses."""
    (path / "torch").mkdir()
    (path / "torch/__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(path))


def test_devices_as_json_are_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(devices, "--json") == 0

    facts = from_json(MachineFacts, json.loads(capsys.readouterr().out))
    cpu = next(report for report in facts.backends if report.name == "cpu")
    assert cpu.probe.usable
    assert cpu.probe.devices[0].compute_units is not None
    assert facts.python == ".".join(map(str, sys.version_info[:3]))


def test_devices_are_shown_with_the_source_of_every_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(devices) == 0

    shown = capsys.readouterr().out
    assert "GiB free" in shown
    assert "cpu:0" in shown
    assert "cpu:0 memory_total_bytes: probe: /" in shown
    assert "cpu:0 compute_units: probe: " in shown


def test_a_device_that_is_not_usable_is_shown_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chip = DeviceFacts("acme", 0, "One [red]", "a1", None, 2**34, ("bfloat16",))
    facts = MachineFacts(
        "Linux",
        "3.11.7",
        (
            BackendReport("acme", Probe(True, False, (chip,), "load the [acme] driver")),
            BackendReport("cuda", Probe(False, False, reason="no /dev/nvidia*")),
        ),
    )

    devices._print_table(facts, "en")

    lines = capsys.readouterr().out.splitlines()
    assert "acme: found, not usable: load the [acme] driver" in lines
    assert "cuda: not found: no /dev/nvidia*" in lines
    row = " ".join(lines)
    assert "[red]" in row
    assert "(not usable)" in row
    assert "16.0" in row


def test_facts_without_a_column_are_shown_with_value_and_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chip = DeviceFacts(
        "acme",
        0,
        "One",
        "a1",
        None,
        2**34,
        ("bfloat16",),
        peak_tflops={"bfloat16": 312.0, "float32": 19.5},
        bandwidth_bytes_per_second=1.555e12,
        uuid="GPU-1",
        links={"acme:1": "NV12"},
        sources={"peak_tflops": "table: a sheet [2]", "links": "probe: acme-smi topo"},
    )
    stranger = DeviceFacts(
        "acme",
        1,
        "Two",
        "a2",
        None,
        None,
        ("bfloat16",),
        sources={"peak_tflops": "unknown: 'Two' is not in the catalogue"},
    )
    probe = Probe(True, True, (chip, stranger))

    devices._print_table(MachineFacts("Linux", "3", (BackendReport("acme", probe),)), "en")

    lines = capsys.readouterr().out.splitlines()
    assert "acme:0 peak_tflops: bfloat16 312, float32 19.5: table: a sheet [2]" in lines
    assert "acme:0 links: NV12 to acme:1: probe: acme-smi topo" in lines
    assert "acme:0 bandwidth_bytes_per_second: 1555 GB/s" in lines
    assert "acme:1 peak_tflops: unknown: 'Two' is not in the catalogue" in lines


def test_known_chips_are_listed_with_numbered_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(devices, "--known") == 0

    lines = capsys.readouterr().out.splitlines()
    (a100,) = [line.split() for line in lines if line.split()[:2] == ["cuda", "A100-SXM4-80GB"]]
    (b3,) = [line.split() for line in lines if line.split()[:2] == ["ascend", "910B3"]]
    assert a100[2:10] == ["80.0", "2039", "312", "312", "19.5", "bf16", "fp16", "fp32"]
    assert b3[2:7] == ["64.0", "?", "?", "?", "?"]
    sources = dict(
        line.strip().split(maxsplit=1) for line in lines[lines.index("", lines.index("") + 1) + 2 :]
    )
    assert set(a100[10:]) <= set(sources)
    assert any("A100 Tensor Core GPU data sheet" in sources[number] for number in a100[10:])
    assert any(line.startswith("910B1, 910B2, 910B3, 910B4") for line in lines)
    assert not [line for line in lines if "…" in line]


def test_known_chips_as_json_have_a_source_beside_each_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(devices, "--known", "--json") == 0

    chips = {chip["name"]: chip for chip in json.loads(capsys.readouterr().out)["chips"]}
    peak = chips["RTX-3090"]["peak_tflops"]["bfloat16"]
    assert set(peak) == {"value", "source", "date"}
    assert peak["value"] == 71
    assert "GA102" in peak["source"]
    assert chips["910B3"]["peak_tflops"] == {}
    assert chips["910B3"]["bandwidth_bytes_per_second"] is None


def test_listing_known_chips_loads_neither_torch_nor_cattrs() -> None:
    code = (
        "import sys; from mst.cli import main; code = main(['devices', '--known']);"
        "heavy = {'torch', 'transformers', 'cattrs', 'numpy'};"
        "print('heavy:', sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert child.stdout.splitlines()[-1] == "heavy: []"


def test_plugins_as_json_name_package_and_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(plugins, "--json") == 0

    listed = json.loads(capsys.readouterr().out)["plugins"]
    cpu = next(one for one in listed if one["name"] == "cpu")
    assert cpu["distribution"] == "mst-train"
    assert cpu["kinds"] == ["backend"]
    assert "mst_probe" in cpu["hooks"]
    assert list(cpu) == ["name", "distribution", "version", "kinds", "status", "reason", "hooks"]


def test_plugins_are_shown_with_why_they_failed(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "ImportError: libacme.so [v2]: cannot open " + "a/long/path/" * 12
    plugins._print_table(
        (
            PluginRecord("cpu", "mst-train", "0.1.0", ("backend",), hooks=("mst_probe",)),
            PluginRecord("acme", "mst-acme", "1.2", status="failed", reason=reason),
        )
    )

    lines = capsys.readouterr().out.splitlines()
    assert f"acme: failed: {reason}" in lines
    assert any("mst-acme 1.2" in line and "failed" in line for line in lines)


def test_looking_at_devices_loads_neither_torch_nor_cattrs() -> None:
    code = (
        "import sys; from mst.cli import main; code = main(['devices']);"
        "heavy = {'torch', 'transformers', 'peft', 'cattrs', 'numpy', 'packaging', 'psutil'};"
        "print('heavy:', sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert child.stdout.splitlines()[-1] == "heavy: []"


def test_a_healthy_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(doctor, "--json") == 0

    answer = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert answer["ok"] is True
    assert checks["import torch"]["status"] == "ok"
    assert checks["transformers"]["status"] == "ok"
    assert checks["backend cpu"]["found"].startswith("cpu:0 ")
    assert {"python", "peft", "memory", "threads", "plugins"} <= set(checks)
    assert {"working directory", "cache directory"} <= set(checks)
    # The extras of developers are none of a user's business.
    assert "pytest" not in checks
    assert "gguf" not in checks


@pytest.mark.parametrize(
    ("source", "found", "advice"),
    [
        pytest.param(
            RAISES_HCCL, "Cause: ImportError: libhccl.so", "source /usr/local/Ascend", id="cann"
        ),
        pytest.param(
            RAISES_OTHER_EXTENSION,
            "Failed to load the backend extension: torch_acme",
            "torch imports without its extensions",
            id="other-extension",
        ),
        pytest.param(
            "raise ModuleNotFoundError(\"No module named 'torch'\")",
            "ModuleNotFoundError: No module named 'torch'",
            "python -m pip install torch",
            id="missing",
        ),
        pytest.param(
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            "libcudart.so.12",
            "install the build for this machine",
            id="wrong-build",
        ),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "ended Python with signal SIGILL",
            "--force-reinstall torch",
            id="illegal-instruction",
        ),
        pytest.param("raise SystemExit(4)", "SystemExit: 4", "--force-reinstall torch", id="exit"),
        pytest.param(
            "import os; os._exit(5)", "with exit code 5", "--force-reinstall torch", id="hard-exit"
        ),
    ],
)
def test_a_broken_torch_is_explained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    found: str,
    advice: str,
) -> None:
    break_torch(tmp_path, monkeypatch, source)

    assert run(doctor, "--json") == 1

    answer = json.loads(capsys.readouterr().out)
    check = next(one for one in answer["checks"] if one["name"] == "import torch")
    assert answer["ok"] is False
    assert check["status"] == "fail"
    assert found in check["found"]
    assert advice in check["advice"]
    # The checks after the broken one are still made.
    assert answer["checks"][-1]["name"] == "cache directory"


def test_the_whole_command_answers_when_torch_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_torch(tmp_path, monkeypatch, RAISES_HCCL)

    child = subprocess.run(
        [sys.executable, "-m", "mst", "doctor"], capture_output=True, text=True, check=False
    )

    assert child.returncode == 1
    assert child.stderr == ""
    broken = [line for line in child.stdout.splitlines() if line.startswith("fail ")]
    assert len(broken) == 1
    assert "libhccl.so" in broken[0]
    assert "To do: python -m pip uninstall torch-npu" in broken[0]


def test_a_torch_py_in_the_working_directory_is_not_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('not me')")
    monkeypatch.chdir(tmp_path)

    assert doctor.check_torch(os.environ).status == "ok"


def test_a_package_outside_its_range_fails_with_the_command_that_mends_it() -> None:
    old = doctor._check_package("pluggy", SpecifierSet(">=99"))
    missing = doctor._check_package("no-such-package-of-mst", SpecifierSet(">=1"))

    assert (old.status, missing.status) == ("fail", "fail")
    assert ">=99 is required" in old.found
    assert old.advice == "python -m pip install 'pluggy>=99'"
    assert missing.found.startswith("not installed")


def chip(backend: str) -> DeviceFacts:
    return DeviceFacts(backend, 0, "Chip", "a1", 1, 1, ("bfloat16",))


CPU = BackendReport("cpu", Probe(True, True, (chip("cpu"),)), (Capabilities("cpu", "gloo"),))
NO_CUDA = BackendReport("cuda", Probe(False, False, reason="no /dev/nvidia*"))
LATE = BackendReport("acme", Probe(False, False, reason="mst_probe: did not answer in 5 s"))
NO_CANN = BackendReport(
    "ascend", Probe(True, False, (chip("ascend"),), "source set_env.sh"), health=("it is hot",)
)


@pytest.mark.parametrize(
    ("reports", "statuses"),
    [
        ((CPU,), {"backend cpu": "ok"}),
        ((CPU, NO_CUDA), {"backend cpu": "ok", "backend cuda": "ok"}),
        ((CPU, LATE), {"backend cpu": "ok", "backend acme": "warn"}),
        (
            (CPU, NO_CANN),
            {"backend cpu": "ok", "backend ascend": "warn", "ascend health": "warn"},
        ),
        ((NO_CUDA,), {"backend cuda": "ok", "devices": "fail"}),
        ((), {"devices": "fail"}),
    ],
)
def test_backends_are_judged(reports: tuple[BackendReport, ...], statuses: dict[str, str]) -> None:
    checks = list(doctor.check_backends(MachineFacts("Linux", "3.11.7", reports)))

    assert {check.name: check.status for check in checks} == statuses


def test_the_reason_of_an_unusable_backend_is_the_advice() -> None:
    checks = list(doctor.check_backends(MachineFacts("Linux", "3.11.7", (NO_CANN,))))

    assert checks[0].advice == "source set_env.sh"
    assert checks[1].found == "it is hot"


def test_a_failed_plugin_warns_and_names_its_package() -> None:
    records = (
        PluginRecord("cpu", "mst-train", "0.1.0"),
        PluginRecord("acme", "mst-acme", "1.2", status="failed", reason="ImportError: libacme"),
    )

    (check,) = doctor.check_plugins(records)

    assert (check.name, check.status) == ("plugin acme", "warn")
    assert check.found == "failed: ImportError: libacme"
    assert "mst-acme 1.2" in check.advice


def test_threads_of_the_shell_are_mentioned_when_they_differ() -> None:
    device = DeviceFacts(
        "cpu",
        0,
        "CPU",
        "x86_64",
        2**33,
        2**32,
        ("float32",),
        compute_units=4,
        sources={"compute_units": "probe: 4 cores", "memory_free_bytes": "probe: /proc/meminfo"},
    )
    facts = MachineFacts("Linux", "3", (BackendReport("cpu", Probe(True, True, (device,))),))

    memory, threads = doctor.check_host(facts, {"OMP_NUM_THREADS": "64"})

    assert memory.found == "4.0 GiB free of 8.0 (probe: /proc/meminfo)"
    assert threads.found.startswith("4 (probe: 4 cores); the shell's OMP_NUM_THREADS=64")
    assert "OMP" not in list(doctor.check_host(facts, {}))[1].found
    assert [check.status for check in doctor.check_host(MachineFacts("L", "3", ()), {})] == ["warn"]


def test_a_directory_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    check = doctor.check_directory("cache directory", tmp_path / "a/b", needed=False)

    assert check.status in ("ok", "warn")
    assert "GiB free" in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("needed", "status"), [(True, "fail"), (False, "warn")])
def test_a_directory_that_cannot_be_written_fails_only_where_it_is_needed(
    tmp_path: Path, needed: bool, status: str
) -> None:
    # A file in place of a directory refuses root as well, which a mode of 0555 does not.
    (tmp_path / "file").write_text("")

    check = doctor.check_directory("working directory", tmp_path / "file", needed=needed)

    assert check.status == status
    assert "cannot be written: Not a directory" in check.found


def test_little_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK_BYTES", 1 << 62)

    check: Any = doctor.check_directory("working directory", tmp_path, needed=True)

    assert check.status == "warn"
    assert "free some space" in check.advice
