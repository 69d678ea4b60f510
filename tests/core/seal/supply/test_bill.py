"""The bill of materials beside a merged model: valid, complete, and without a row."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mst import rundir
from mst.seal.supply.bill import BILL
from mst.seal.supply.packages import package_components


@pytest.fixture(scope="module")
def bill(merged: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((merged / BILL).read_text(encoding="utf-8"))
    return found


def problem(text: str) -> object:
    """Return what CycloneDX's strict schema says against a bill; None for nothing."""
    pytest.importorskip("jsonschema", reason="needs cyclonedx-python-lib[json-validation]")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def test_it_is_valid_by_the_strict_schema(merged: Path, bill: dict[str, Any]) -> None:
    assert problem((merged / BILL).read_text(encoding="utf-8")) is None
    assert problem(json.dumps(bill | {"unknown": 1})) is not None
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["specVersion"] == "1.6"


def test_every_reference_leads_to_one_component(bill: dict[str, Any]) -> None:
    text = json.dumps(bill)
    named = re.findall(r'"bom-ref": "([^"]+)"', text)
    used = [each["ref"] for each in bill["dependencies"]]
    used += [ref for each in bill["dependencies"] for ref in each["dependsOn"]]
    card = bill["metadata"]["component"]["modelCard"]
    used += [each["ref"] for each in card["modelParameters"]["datasets"]]

    assert len(named) == len(set(named))
    assert set(used) <= set(named)
    assert {"model", "base", "adapter", "mst", "data-1"} <= set(named)


def test_every_written_file_is_hashed_as_it_lies_there(merged: Path, bill: dict[str, Any]) -> None:
    listed = {
        each["name"]: each["hashes"][0]["content"]
        for each in bill["metadata"]["component"]["components"]
    }
    there = {each.name for each in merged.iterdir()} - {BILL, "manifest.json"}

    assert set(listed) == there
    for name, expected in listed.items():
        assert hashlib.sha256((merged / name).read_bytes()).hexdigest() == expected
    # The manifest of the directory, which is written last, proves the bill itself.
    assert BILL in json.loads((merged / "manifest.json").read_text())["files"]


def test_base_adapter_data_and_parameters_are_named(
    bill: dict[str, Any], finished_run: Path, tiny_model: Path
) -> None:
    manifest = rundir.read_manifest(finished_run)
    component = bill["metadata"]["component"]
    (base,) = component["pedigree"]["ancestors"]
    hashes = {each["name"]: each["hashes"][0]["content"] for each in base["components"]}
    adapter = next(each for each in bill["components"] if each.get("bom-ref") == "adapter")
    data = [each for each in bill["components"] if each["type"] == "data"]
    card = component["modelCard"]
    said = {each["name"]: each["value"] for each in card["properties"]}
    metrics = {each["type"] for each in card["quantitativeAnalysis"]["performanceMetrics"]}
    weights = (tiny_model / "model.safetensors").read_bytes()
    lora = (finished_run / "adapter" / "adapter_model.safetensors").read_bytes()

    assert hashes["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert {"mst:base:fingerprint": manifest.model_sha256}.items() <= {
        each["name"]: each["value"] for each in base["properties"]
    }.items()
    assert hashlib.sha256(lora).hexdigest() in json.dumps(adapter)
    assert [each["hashes"][0]["content"] for each in data] == [manifest.data[0].sha256]
    assert said["mst:training:learning_rate"] == "0.01"
    assert said["mst:training:tuner"] == "lora"
    assert said["mst:training:seed"] == "42"
    assert "best_eval_loss" in metrics


def test_no_row_and_no_file_name_of_the_data_is_in_it(merged: Path) -> None:
    text = (merged / BILL).read_text(encoding="utf-8")

    assert "rows.jsonl" not in text
    assert "my card" not in text


def test_every_installed_package_is_listed_with_its_licence() -> None:
    found = {each["name"]: each for each in package_components()}

    assert found["torch"]["version"] == importlib.metadata.version("torch")
    assert found["torch"]["purl"].startswith("pkg:pypi/torch@")
    assert "+" not in found["torch"]["purl"]
    without = [name for name, each in found.items() if "licenses" not in each]
    assert len(without) < len(found) / 5, without


def test_the_base_models_licence_is_taken_from_its_card(tiny_model: Path, tmp_path: Path) -> None:
    from mst.seal.supply.bill import _licence

    model = shutil.copytree(tiny_model, tmp_path / "model")

    assert _licence(model) is None
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    assert _licence(model) == "apache-2.0"
    (model / "README.md").write_text("# Model\nlicense: none\n")
    assert _licence(model) is None
