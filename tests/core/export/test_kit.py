"""`mst plugins check`: a whole target passes, and each broken one fails where it is broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mst.cli import main

# A whole target, and one fault of each kind, chosen by a variable.
TARGET = """
import os
import shutil
from pathlib import Path

from mst.errors import PlanError
from mst.export import Bounds, ExportPlan, ExportReport
from mst.hookspecs import hookimpl

FAULTS = os.environ.get("FAULTS", "").split()


@hookimpl
def mst_export_name():
    return "acme"


@hookimpl
def mst_export_check(request):
    if "heavy" in FAULTS:
        import torch
    if request.bits:
        if "raises" in FAULTS:
            raise ValueError(request.bits)
        raise PlanError("--bits: acme has none. Leave it out.")
    size = 10 if "forecast" in FAULTS else 10**6
    kl = 100.0 if "bounds" in FAULTS else 0.1
    return ExportPlan("acme", Bounds(1.1, kl, 0.9, weight_error=0.1), size, 10**6, True)


@hookimpl
def mst_export(request):
    source, target = Path(request.model_dir), Path(request.output_dir)
    if "crash" in FAULTS:
        os.abort()
    for each in source.iterdir():
        shutil.copyfile(each, target / each.name)
    if "outside" in FAULTS:
        (target.parent / "left.txt").write_text("x")
    if "template" in FAULTS:
        (target / "chat_template.jinja").write_text("{{ messages }}")
    if "unlike" in FAULTS:
        (target / "made").write_bytes(os.urandom(8))
    if "rows" in FAULTS:
        (target / "rows.txt").write_text(str(request.calibration))
    files = sorted(each.name for each in target.iterdir())
    return ExportReport("acme", tuple(files[1:] if "listing" in FAULTS else files))


@hookimpl
def mst_export_weights(directory):
    from safetensors.torch import load_file

    for name, value in load_file(Path(directory, "model.safetensors")).items():
        if "missing" in FAULTS and name == "model.norm.weight":
            continue
        yield name, value * 2 if "scale" in FAULTS else value
"""
CHECK_OF = {
    "heavy": "export.light", "raises": "export.refuses", "forecast": "export.forecasts",
    "bounds": "export.plans", "outside": "export.writes", "listing": "export.writes",
    "template": "export.alone", "unlike": "export.repeats", "rows": "export.private",
    "missing": "export.computes", "scale": "export.computes", "crash": "export.writes",
}  # fmt: skip
# Those of one line don't hide one another; of a target that writes wrongly no more is asked.
TOGETHER = (
    ("heavy", "raises", "outside"),
    ("forecast", "template", "unlike", "rows", "scale"),
    ("missing",),
    ("bounds",),
    ("listing",),
    ("crash",),
)


@pytest.fixture
def acme(tmp_path: Path) -> dict[str, str]:
    """The environment in which the target is installed."""
    (tmp_path / "acme_target.py").write_text(TARGET)
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mst]\nacme = acme_target\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def statuses(environ: dict[str, str], name: str = "acme") -> tuple[int, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "mst", "plugins", "check", name, "--json"],
        env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, {each["id"]: each["status"] for each in json.loads(done.stdout)}


def test_a_whole_target_passes(acme: dict[str, str]) -> None:
    code, found = statuses(acme)

    assert code == 0
    assert {name for name, status in found.items() if status != "pass"} == {"export.rounds"}


@pytest.mark.slow
@pytest.mark.parametrize("faults", TOGETHER, ids=" ".join)
def test_a_broken_target_fails_where_it_is_broken(
    acme: dict[str, str], faults: tuple[str, ...]
) -> None:
    code, found = statuses(acme | {"FAULTS": " ".join(faults)})
    failed = {name for name, status in found.items() if status == "fail"}

    assert (code, failed) == (1, {CHECK_OF[each] for each in faults})


def test_each_fault_is_tried() -> None:
    assert sorted(each for faults in TOGETHER for each in faults) == sorted(CHECK_OF)


@pytest.mark.slow
# TurboMind's is what GPTQ gives, in another layout; GPTQ's own: tests/plugins/test_gptqmodel.py.
@pytest.mark.parametrize("name", ["merged", "turbomind"])
def test_built_in_targets_keep_every_promise(name: str) -> None:
    if name != "merged" and not list(importlib.metadata.distributions(name="gptqmodel")):
        pytest.skip("wants the extra gptq")
    code, found = statuses(dict(os.environ) | {"OMP_NUM_THREADS": "1"}, name)

    assert (code, [each for each, status in found.items() if status == "fail"]) == (0, [])


def test_an_unknown_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "nope"]) == 2
    assert "no export target 'nope' is installed here" in capsys.readouterr().err
    assert main(["plugins", "check"]) == 2
    assert "name the export target" in capsys.readouterr().err


def test_the_documented_promises_are_those_that_are_checked() -> None:
    from mst.conformance.export_target import CHECKS

    text = (Path(__file__).parents[3] / "docs/conformance.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `export.")]

    assert rows == [f"| `{check}` | {title} |" for check, title, _ in CHECKS]
