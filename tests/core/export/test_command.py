"""`mst export` as a user types it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mst.cli import main
from mst.durable import sha256

LOADERS = ("gptqmodel", "optimum", "compressed-tensors")
FORMATS = ("merged", "gptq", "awq", "compressed-tensors", "turbomind")


def mst(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def manifest_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return found


@pytest.fixture(scope="module")
def learnt_run(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt its four answers: rounding does not change what it says."""
    path = tmp_path_factory.mktemp("runs") / "learnt"
    done = mst(
        "train", "--model", tiny_model, "--dataset", chat_rows, "--output-dir", path,
        "--device", "cpu", "--threads", 1, "--max-steps", 60, "--learning-rate", 0.02,
        "--val-size", 8, "--label-accuracy", "off", "--per-device-train-batch-size", 8,
        "--gradient-accumulation-steps", 1, "--train-on", "all", "--lora-rank", 32,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def exported(learnt_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All formats of one run, rounded; one call."""
    place = tmp_path_factory.mktemp("export") / "out"
    done = mst("export", learnt_run, "--format", *FORMATS, "--method", "rtn", "--output-dir", place)

    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.count("merging and comparing") == 1
    return place


@pytest.mark.parametrize("name", FORMATS)
def test_an_artefact_says_what_it_is_and_how_it_was_compared(
    exported: Path, learnt_run: Path, name: str
) -> None:
    manifest = manifest_of(exported / name)
    readme = (exported / name / "README.md").read_text()
    files = {each.name for each in (exported / name).iterdir()}

    assert (manifest["status"], manifest["faults"], manifest["format"]) == ("passed", [], name)
    assert manifest["run"] == learnt_run.name
    assert files == {*manifest["files"], "manifest.json"}
    assert {"sbom.cdx.json", "tokenizer.json", "chat_template.jinja", "config.json"} <= files
    assert all(
        sha256(exported / name / file) == facts["sha256"]
        for file, facts in manifest["files"].items()
    )
    assert manifest["quality"]["model"]["tokens"] > 50
    assert manifest["merge"]["same_answers"] == manifest["merge"]["prompts"] == 8
    assert f"## Export: {name}" in readme
    assert "my card is" not in readme + json.dumps(manifest)


def test_groups_are_the_largest_that_the_widths_allow_and_the_reason_is_said(
    learnt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(learnt_run), "--output-dir", str(tmp_path / "out"), "--dry-run"]
    code = main([*arguments, "--format", "gptq", "turbomind", "--method", "rtn"])
    said = capsys.readouterr().out

    assert code == 0
    assert "gptq: 4 bits, groups of 64, symmetric, rounded to nearest" in said
    assert "128 does not divide 64" in said
    assert "turbomind: compressed-tensors: 4 bits, groups of 32" in said
    assert "not checked here: loaded by TurboMind" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_transformers_loads_the_artefact_and_computes_what_was_compared(
    exported: Path, name: str
) -> None:
    if not all(list(importlib.metadata.distributions(name=each)) for each in LOADERS):
        pytest.skip(f"wants {', '.join(LOADERS)}")
    code = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from transformers import AutoModelForCausalLM
from mst.export.gate import put_weights
from mst_plugins.weights import unpacked_weights
artefact, merged = map(Path, sys.argv[1:])
loaded = AutoModelForCausalLM.from_pretrained(artefact, dtype=torch.float32, device_map="cpu")
ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
assert put_weights(ours, unpacked_weights(artefact)) == []
ids = torch.arange(5, 205).view(4, 50)
with torch.inference_mode():
    a, b = loaded(input_ids=ids).logits.float(), ours(input_ids=ids).logits
print(float((a - b).norm() / b.norm()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, exported / name, exported / "merged"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    # The int4 kernels for a CPU compute in bfloat16.
    assert float(done.stdout.split()[-1]) < 0.1


def test_an_artefact_is_never_overwritten(
    exported: Path, learnt_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["export", str(learnt_run), "--output-dir", str(exported), "--format", "merged"])

    assert code == 1
    assert "is there already and is never overwritten" in capsys.readouterr().err


def test_one_that_has_failed_stays_marked_and_is_replaced(learnt_run: Path, tmp_path: Path) -> None:
    vendor = tmp_path / "vendor"
    vendor.mkdir()
    (vendor / "lossy.py").write_text(LOSSY)
    info = vendor / "lossy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lossy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mst]\nlossy = lossy\n")
    arguments = ("export", learnt_run, "--format", "lossy", "--output-dir", tmp_path / "out")
    path = os.pathsep.join([str(vendor), os.environ.get("PYTHONPATH", "")])
    bad = mst(*arguments, PYTHONPATH=path, LOSSY="0.5")
    manifest = manifest_of(tmp_path / "out/lossy")
    readme = (tmp_path / "out/lossy/README.md").read_text()
    # What was found of the merge is kept with it, and not asked again.
    check = tmp_path / "out/.merged/check.json"
    check.write_text(check.read_text().replace('"prompts": 8', '"prompts": 80'))
    raised = mst(*arguments, PYTHONPATH=path, LOSSY="a secret")
    good = mst(*arguments, PYTHONPATH=path, LOSSY="1")

    assert bad.returncode == 3, bad.stderr
    assert manifest["status"] == "failed"
    assert "differs from what was trained by 0.5" in manifest["faults"][0]
    assert "has failed its comparison. Do not serve it" in readme
    assert raised.returncode == 1
    assert "the export target 'lossy' raised ValueError in" in raised.stderr
    assert "a secret" not in raised.stdout + raised.stderr
    assert good.returncode == 0, good.stderr
    assert manifest_of(tmp_path / "out/lossy")["status"] == "passed"
    assert (
        manifest["merge"]["prompts"],
        manifest_of(tmp_path / "out/lossy")["merge"]["prompts"],
    ) == (8, 80)


LOSSY = """
import os, shutil
from pathlib import Path
from mst.export import Bounds, ExportPlan, ExportReport
from mst.hookspecs import hookimpl

@hookimpl
def mst_export_name():
    return "lossy"

@hookimpl
def mst_export_check(request):
    return ExportPlan("scaled", Bounds(1.5, 0.5, 0.5, weight_error=0.1), 1, 1)

@hookimpl
def mst_export(request):
    from safetensors.torch import load_file, save_file
    for each in Path(request.model_dir).iterdir():
        if each.suffix == ".safetensors":
            tensors = {k: v * float(os.environ["LOSSY"]) for k, v in load_file(each).items()}
            save_file(tensors, Path(request.output_dir, each.name))
        elif each.name not in ("manifest.json", "merge.json", "README.md", "sbom.cdx.json"):
            shutil.copyfile(each, Path(request.output_dir, each.name))
    return ExportReport("lossy", ())

@hookimpl
def mst_export_weights(directory):
    from safetensors.torch import load_file
    for each in Path(directory).glob("*.safetensors"):
        yield from load_file(each).items()
"""

REFUSED: list[tuple[tuple[str, ...], int, str]] = [
    (("--format", "exl9"), 2, "--format exl9 was asked for; the export targets here are"),
    (("--format", "gptq", "--bits", "3", "--method", "rtn"), 1, "--bits 3 was asked for; gptq has"),
    (("--format", "awq", "--bits", "8", "--method", "rtn"), 1, "--bits 8 was asked for; awq has 4"),
    (("--format", "gptq", "--group-size", "48", "--method", "rtn"), 1, "--group-size 48"),
    (("--format", "gptq", "--group-size", "128", "--method", "rtn"), 1, "does not divide 64"),
    (("--format", "gptq", "--group-size", "x"), 2, "--group-size takes auto or a number"),
    (("--format", "gptq", "--method", "magic"), 1, "--method magic was asked for; this format has"),
    (("--format", "turbomind", "--method", "awq"), 1, "groups of 128, which do not divide 64"),
    (("--calibration-rows", "0"), 2, "--calibration-rows 0: at least 1"),
    (("--option", "depth"), 2, "--option takes NAME=VALUE"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSED)
def test_what_cannot_be_is_refused_before_any_work(
    learnt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], code: int, said: str,
) -> None:  # fmt: skip
    place = tmp_path / "out"
    found = main(["export", str(learnt_run), "--output-dir", str(place), *arguments])

    assert found == code
    assert said in capsys.readouterr().err
    assert not place.exists()


def test_a_merged_model_is_no_run(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["export", str(merged)])

    assert code == 1
    assert "is a merged model, and an export needs the run that it came from" in (
        capsys.readouterr().err
    )


def test_another_base_than_that_of_the_training_is_refused(
    learnt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(learnt_run, run)
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(document | {"model_sha256": "0" * 64}))
    code = main(["export", str(run)])

    assert code == 1
    assert "holds another model than" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_refused(
    learnt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(learnt_run, run)
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(document | {"status": "failed"}))
    code = main(["export", str(run)])

    assert code == 1
    assert "is failed, so it has no result yet" in capsys.readouterr().err


def test_a_calibration_file_without_rows_or_of_another_key_is_named_before_any_work(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, rows = tmp_path / "empty.jsonl", tmp_path / "rows.jsonl"
    empty.write_text("")
    rows.write_text('{"prompt": "a secret", "response": "yes"}\n')
    for name in ("key", "other"):
        assert main(["data", "keygen", "--key-file", str(tmp_path / name)]) == 0
    assert main(["data", "encrypt", str(rows), "--key-file", str(tmp_path / "key")]) == 0
    place = tmp_path / "out"
    for path, said in (
        (
            empty,
            "empty.jsonl was given as a data set, but it holds no rows (it is empty). Add at"
            " least one row, or pass another --calibration.",
        ),
        (tmp_path / "rows.jsonl.mst", "does not open with key-file"),
    ):
        code = main([
            "export", str(finished_run), "--format", "gptq", "--method", "rtn", "--calibration",
            str(path), "--key-file", str(tmp_path / "other"), "--output-dir", str(place),
        ])  # fmt: skip
        told = capsys.readouterr()

        assert code == 1
        assert said in " ".join(told.err.split())
        assert "secret" not in told.out + told.err
        assert not place.exists()
