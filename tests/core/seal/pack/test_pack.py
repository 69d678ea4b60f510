"""The archive for an auditor: what is in it, and that nobody changes it unseen."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mst.cli import main
from mst.errors import AuditError
from mst.seal.pack.archive import LISTING, PUBLIC, SIGNATURE, check, write
from mst.seal.pack.rules import ITEMS

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pack(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packs") / "tiny.zip"

    assert main(["audit", "pack", str(finished_run), "--output", str(target)]) == 0
    return target


def parts(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_it_holds_the_evidence_and_no_row(pack: Path, finished_run: Path) -> None:
    found = parts(pack)
    wanted = {name for each in ITEMS for name in each.members} - {"sbom.cdx.json"}
    events = [json.loads(line) for line in found["audit/events.jsonl"].splitlines()]
    outputs = json.loads(found["outputs.json"])

    assert wanted <= set(found)
    assert {"train.begun", "train.ended"} <= {each["event"] for each in events}
    assert outputs
    assert set(outputs.values()) == {"as logged"}
    assert json.loads(found["run/seal.json"])["layer"]
    assert json.loads(found["personal-data.json"])[0]["found"] == {}
    for name, data in found.items():
        for word in (b"my card is", b"the loan is", b"too high"):
            assert word not in data, name


def test_a_person_can_read_it(pack: Path) -> None:
    text = parts(pack)["index.html"].decode()

    assert "It certifies nothing" in text
    assert "all as logged" in text
    assert "not shown: no sbom.cdx.json" in text
    for words in ("HIPAA 164.312(b)", "GDPR 30(1)", "PIPL 51", "GB/T 22239", "21(3)"):
        assert words in text
    assert "<script" not in text


def test_names_are_no_markup(tmp_path: Path, finished_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    manifest = json.loads((run / "run.json").read_text())
    manifest["model"] = "<img src=x onerror=alert(1)>"
    (run / "run.json").write_text(json.dumps(manifest))
    target = tmp_path / "a.zip"

    assert main(["audit", "pack", str(run), "--output", str(target)]) == 0
    assert b"<img" not in parts(target)["index.html"]


def test_the_bill_of_an_export_is_in_the_archive(tmp_path: Path, finished_run: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "a.zip"
    shutil.copytree(finished_run, run)
    assert main(["export", str(run)]) == 0
    assert main(["audit", "pack", str(run), "--output", str(target)]) == 0

    assert parts(target)["sbom.cdx.json"] == (run / "export/merged/sbom.cdx.json").read_bytes()


def test_a_result_that_was_changed_is_told(
    tmp_path: Path, finished_run: Path, tiny_model: Path, chat_rows: Path, capsys: Capture
) -> None:
    run, target = tmp_path / "run", tmp_path / "a.zip"
    flags = ["--model", str(tiny_model), "--dataset", str(chat_rows), "--max-steps", "1"]
    assert main(["train", *flags, "--output-dir", str(run), "--label-accuracy", "off"]) == 0
    (run / "adapter/adapter_config.json").write_text("{}")
    (run / "adapter/README.md").unlink(missing_ok=True)
    assert main(["audit", "pack", str(run), "--output", str(target)]) == 0
    outputs = json.loads(parts(target)["outputs.json"])

    assert outputs["adapter/adapter_config.json"] == "changed"
    assert "adapter_config.json is changed" in parts(target)["index.html"].decode()


def test_it_is_verified_against_the_key_of_the_log(
    pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["audit", "key"]) == 0
    public = tmp_path / "key.pub"
    public.write_text(capsys.readouterr().out)
    assert main(["audit", "verify", "--pack", str(pack), "--public-key", str(public)]) == 0
    assert "note" not in capsys.readouterr().out
    assert main(["audit", "verify", "--pack", str(pack)]) == 0
    assert "note: whose key that is" in capsys.readouterr().out

    # The whole archive again, signed by somebody else.
    forged = tmp_path / "forged.zip"
    members = {
        name: data for name, data in parts(pack).items() if name not in (LISTING, SIGNATURE, PUBLIC)
    }
    write(members, Path("/run"), "2026-11-26T00:00:00Z", Ed25519PrivateKey.generate(), forged)
    assert check(forged).files == len(members)
    assert main(["audit", "verify", "--pack", str(forged), "--public-key", str(public)]) != 0
    assert "another key" in capsys.readouterr().err


def changed_member(found: dict[str, bytes]) -> dict[str, bytes]:
    return {**found, "run/run.json": found["run/run.json"].replace(b'"done"', b'"gone"')}


def one_less(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name != "run/seal.json"}


def one_more(found: dict[str, bytes]) -> dict[str, bytes]:
    return {**found, "extra.txt": b"trust me"}


def another_listing(found: dict[str, bytes]) -> dict[str, bytes]:
    return {**found, LISTING: found[LISTING].replace(b'"created": "2', b'"created": "1')}


def no_signature(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name != SIGNATURE}


@pytest.mark.parametrize(
    "change", [changed_member, one_less, one_more, another_listing, no_signature]
)
def test_a_changed_archive_is_refused(
    pack: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(parts(pack)).items():
            archive.writestr(name, data)

    with pytest.raises(AuditError, match="is not what `mst audit pack` wrote"):
        check(path)


def test_random_damage_is_refused_or_changes_nothing(pack: Path, tmp_path: Path) -> None:
    whole, draw = pack.read_bytes(), random.Random(0)
    expected, path = parts(pack), tmp_path / "a.zip"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
        try:
            check(path)
        except AuditError:
            refused += 1
        else:
            assert parts(path) == expected
    assert refused > 200


def test_nothing_is_replaced(pack: Path, finished_run: Path, capsys: Capture) -> None:
    before = pack.read_bytes()
    code = main(["audit", "pack", str(finished_run), "--output", str(pack)])

    assert code != 0
    assert "already" in capsys.readouterr().err
    assert pack.read_bytes() == before
    assert [each.name for each in pack.parent.iterdir()] == [pack.name]


def test_what_is_no_run_and_no_archive_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main(["audit", "pack", str(tmp_path)]) != 0
    assert "no run" in capsys.readouterr().err
    for data in (b"", b"PK\3\4", b"text"):
        (tmp_path / "a.zip").write_bytes(data)
        assert main(["audit", "verify", "--pack", str(tmp_path / "a.zip")]) != 0
    assert main(["audit", "verify", "--pack", str(tmp_path / "gone.zip")]) != 0
    assert "Traceback" not in capsys.readouterr().err
