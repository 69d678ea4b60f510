"""`mst --version`: the first line for programs, then every part, and nothing is imported."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import mst
from mst import cli, versions


def test_the_first_line_is_the_version_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"mst {mst.__version__}"
    found = dict(line.split(None, 1) for line in rest)
    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    assert "cpu" in found["plugins"].split(", ")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert plain["plugins"]["cpu"].startswith("mst-train ")
    assert cli.main(["--version", "--loud"]) == 2


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys\nfrom mst.cli import main\nmain(['--version'])\n"
        "sys.exit(','.join({'torch', 'transformers', 'peft', 'mst_backends'} & set(sys.modules))"
        " or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("packed", [False, True])
def test_the_commit_of_a_checkout_is_told(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "core" / "mst"
    source.mkdir(parents=True)
    monkeypatch.setattr(mst, "__file__", str(source / "__init__.py"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    if packed:
        subprocess.run([*git, "pack-refs", "--all"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)

    assert versions.versions().commit == head.stdout.strip()


def test_no_commit_is_told_where_none_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mst, "__file__", str(tmp_path / "a/b/__init__.py"))
    assert versions.versions().commit == ""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/../../../secret\n")
    assert versions.versions().commit == ""
