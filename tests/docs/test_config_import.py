"""docs/config-import.md says what the translations do."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from mst import cli
from mst.foreign.translate import TOOLS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/config-import.md").read_text(encoding="utf-8")


def test_the_tables_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("table", ROOT / "ci/make_import_table.py")

    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert module.document(TEXT) == TEXT, "run: python ci/make_import_table.py"


def test_the_versions_are_those_that_the_modules_cite() -> None:
    modules = [importlib.import_module(f"mst.foreign.{name.replace('-', '_')}") for name in TOOLS]
    cited = [re.search(r" at (\w{9})", module.__doc__ or "") for module in modules]

    assert len(cited) == len(TOOLS)
    assert [each for each in cited if each is None or each[1] not in TEXT] == []


def test_the_documented_file_is_translated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)

    assert example is not None
    (tmp_path / "other.yaml").write_text(example[1])
    assert cli.main(["config", "import", "other.yaml", "--strict"]) == 0
    assert "tuner: qlora" in capsys.readouterr().out
