"""`mst bug-report`: what a maintainer needs, and no canary that was put anywhere."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.canaries import STEM, canaries, leaks

from mst import cli, rundir
from mst.bug_report.blank import blanked, names_here, without_names


def planted(value: Any, texts: Any) -> Any:
    """Return a document with a canary for every text that isn't a word of the program."""
    if isinstance(value, dict):
        return {key: planted(each, texts) for key, each in value.items()}
    if isinstance(value, list):
        return [planted(each, texts) for each in value]
    return next(texts) if isinstance(value, str) and ("/" in value or " " in value) else value


@pytest.fixture
def run_of_canaries(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose name, paths, errors, labels and texts are canaries, in a home that is one too."""
    texts = canaries()
    home = tmp_path / f"home-{STEM}"
    (home / "runs").mkdir(parents=True)
    monkeypatch.chdir(home)
    run = shutil.copytree(finished_run, home / "runs" / f"{STEM}00001")
    for name in (rundir.MANIFEST, rundir.PLAN, rundir.REQUEST):
        plain = planted(json.loads((run / name).read_text()), texts)
        if name == rundir.MANIFEST:
            plain |= {"status": "failed", "error": next(texts), "model": next(texts)}
            plain["results"] |= {next(texts): 0.5, "accuracy_rows": 8.0}
            plain["outputs"] = {f"{next(texts)}.bin": "0" * 64}
        if name == rundir.REQUEST:
            plain["dataset"] = [next(texts)]
            plain["system"] = next(texts)
        (run / name).write_text(json.dumps(plain))
    return run


def test_nothing_of_a_run_that_names_anything_is_in_it(
    run_of_canaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = canaries()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / f"home-{STEM}"))
        patch.setenv("USER", f"{STEM}user")
        patch.setenv("HF_TOKEN", next(texts))
        patch.setenv("MST_MODELS", f"/srv/{STEM}")
        code = cli.main(["bug-report", "--run", str(run_of_canaries), "--out", "report.zip"])
    out, err = capsys.readouterr()

    assert code == 0, err
    report = Path("report.zip")
    with zipfile.ZipFile(report) as archive:
        held = {each: archive.read(each) for each in archive.namelist()}
        comments = [archive.comment, *(each.comment + each.extra for each in archive.infolist())]
    assert {name for name, data in held.items() if leaks(data) or leaks(name.encode())} == set()
    assert not leaks(b"".join(comments))
    # The run that it was made of is full of them, or nothing above would show anything.
    assert leaks((run_of_canaries / rundir.REQUEST).read_bytes())
    assert not leaks((out + err).replace(str(Path.cwd()), "").encode())
    assert out.index("plan.json") < out.index("written")
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    assert set(held) == {
        "README.txt", "versions.json", "devices.json", "plugins.json", "doctor.json",
        "variables.json", "run/run.json", "run/plan.json", "run/request.json", "run/facts.json",
    }  # fmt: skip

    plan = json.loads(held["run/plan.json"])
    assert (plan["backend"], plan["tuner"], plan["torch_devices"]) == ("cpu", "lora", ["cpu"])
    assert plan["total_steps"] == 4
    manifest = json.loads(held["run/run.json"])
    assert manifest["status"] == "failed"
    assert manifest["results"]["accuracy_rows"] == 8.0
    assert manifest["versions"]["torch"]
    assert "HF_TOKEN" in json.loads(held["variables.json"])
    backends = {each["name"]: each for each in json.loads(held["devices.json"])["backends"]}
    assert backends["cpu"]["probe"]["devices"][0]["memory_total_bytes"]


def test_the_newest_run_is_taken_and_a_damaged_one_is_told(
    run_of_canaries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mst.cli.doctor.all_checks", lambda _: iter(()))
    (run_of_canaries / rundir.PLAN).write_text(f'{{"{STEM}')

    assert cli.main(["bug-report", "--show"]) == 0
    out = capsys.readouterr().out
    assert "== run/plan.json" in out
    assert "JSONDecodeError" in out
    assert not leaks(out.encode())
    assert not list(Path().glob("*.zip"))


def test_a_report_without_a_run_and_over_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mst.cli.doctor.all_checks", lambda _: iter(()))

    assert cli.main(["bug-report", "--no-run", "--output", "a.zip"]) == 0
    assert cli.main(["bug-report", "--no-run", "--output", "a.zip"]) == 1
    assert "never overwritten" in capsys.readouterr().err
    assert cli.main(["bug-report", "--no-run", "--output", "none/a.zip"]) == 1
    assert cli.main(["bug-report", "--no-run", "--output", "."]) == 1
    assert "it is a directory" in capsys.readouterr().err
    assert cli.main(["bug-report", "--no-run", "--run", "x"]) == 2
    assert sorted(os.listdir()) == ["a.zip"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("3.11 at /home/liu/env/bin/python", "3.11 at <path>"),
        ("~/models and ./runs/a and ../b", "<path> and <path> and <path>"),
        ("/dev/nvidia0 is there, 12.5 GiB free", "/dev/nvidia0 is there, 12.5 GiB free"),
        ("/usr/lib/../../home/liu", "<path>"),
        ("see https://ci.ward7.example/job?x=1.", "see <address>"),
        ("ask liu.wei@hospital.cn or 10.1.2.3", "ask <address> or <address>"),
        ("cannot read '/data/My Ward/liu 1.csv': x", "cannot read '<path>': x"),
        ("病房.jsonl.mst is no file, torch 2.13.0 is", "<file> is no file, torch 2.13.0 is"),
        ("data/ward.jsonl, ~wei/x, at 3 GB/s", "<path>, <path>, at 3 GB/s"),
        ("it doesn't see '/dev/nvidia0', isn't it", "it doesn't see '/dev/nvidia0', isn't it"),
        ("fe80::1ff:fe23:4567:890a and A1:B2:C3:D4:E5:F6", "<address> and <address>"),
        ("on ward7-gpu by liu", "on <name> by <name>"),
        ("on WARD7-GPU.hospital.example by Liu.", "on <name> by <name>."),
        ("a\nb\x00", "a b"),
    ],
)
def test_a_message_loses_its_names(text: str, left: str) -> None:
    assert without_names(text, ("ward7-gpu", "liu")) == left


def test_of_a_document_only_known_words_stay() -> None:
    value = {
        "tuner": "lora", "name": "Liu Wei", "Liu": 3, "list": ["cuda:1", "2024.01.csv"],
        "versions": {"name": "2.13.0+cpu"},
    }  # fmt: skip
    found = blanked(value, frozenset({"tuner", "name", "list", "versions"}), frozenset({"lora"}))

    assert found == {
        "tuner": "lora", "name": "<text>", "<name 2>": 3, "list": ["cuda:1", "<text>"],
        "versions": {"name": "2.13.0+cpu"},
    }  # fmt: skip


def test_this_machine_and_its_user_are_known_by_name() -> None:
    names = names_here({"USER": "liu", "HOSTNAME": "ward7"})

    assert {"liu", "ward7"} <= set(names)
    assert "root" not in names
