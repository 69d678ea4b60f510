"""`mst models add` and `verify`: copied whole or not at all, and every change is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mst import cli
from mst.model.adding import add
from mst.seal.supply.standing import git_hash, hash_state


@pytest.fixture
def source(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "source" / "tiny")


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["models", *arguments]) == 1
    return capsys.readouterr().err


def test_an_added_model_is_found_by_its_name_and_verified(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    (source / ".git").mkdir()

    assert cli.main(["models", "add", str(source), "--name", "org/mine"]) == 0
    out = capsys.readouterr().out
    for name in (".git", "modeling.py", "pytorch_model.bin"):
        assert name in out
        assert not (place / "org/mine" / name).exists()
    listing = place / "org/mine.sha256"
    check = ["sha256sum", "-c", "--quiet", str(listing)]
    assert subprocess.run(check, cwd=place / "org/mine").returncode == 0
    assert hash_state(place / "org/mine").source == "listing"
    assert hash_state(place / "org/mine").verified
    assert cli.main(["models", "verify", "org/mine"]) == 0
    assert not hash_state(place / "org/mine").changed
    assert "there already" in failed(capsys, "add", str(source), "--name", "org/mine")

    weights = place / "org/mine/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hash_state(place / "org/mine").changed
    assert "model.safetensors differs" in failed(capsys, "verify", "org/mine")


def test_a_source_that_is_not_what_its_hashes_say_is_not_added(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = source.with_name("tiny.sha256")
    assert cli.main(["model", "manifest", str(source), "--output", str(listing)]) == 0
    (source / "config.json").write_text((source / "config.json").read_text() + " ")

    assert "config.json differs" in failed(capsys, "add", str(source))
    assert not (place / "tiny").exists()
    (place / "tiny").mkdir()
    said = failed(capsys, "add", str(source))
    assert "there already" in said
    assert "comparing the source" not in said  # which takes minutes


def test_a_linked_model_stays_where_it_is(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", "add", str(source), "--link"]) == 0
    assert (place / "tiny").readlink() == source
    assert cli.main(["models", "verify", "tiny"]) == 0
    (source / "extra.json").write_text("{}")
    assert "extra.json is not listed" in failed(capsys, "verify", "tiny")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: (s / "model.safetensors").rename(s / "pytorch_model.bin"), "a pickle"),
        (lambda s: (s / "vocab.json").symlink_to("/etc/passwd"), "outside of the model"),
        (lambda s: (s / "config.json").unlink(), "no config.json"),
        (lambda s: os.truncate(s / "model.safetensors", 500), "not a whole safetensors"),
        (lambda s: shutil.rmtree(s), "nothing is there"),
    ],
)
def test_what_is_no_model_is_not_added(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str], make: object, words: str
) -> None:
    assert callable(make)
    make(source)

    assert words in failed(capsys, "add", str(source))
    assert not place.exists() or not [each for each in place.iterdir() if each.name[0] != "."]


@pytest.mark.parametrize("name", ["../evil", "a/b/c", ".hidden", "a b", "", "a/..", "\x1b[2J"])
def test_a_name_that_is_none_is_refused(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name:
        assert "can't be called" in failed(capsys, "add", str(source), "--name", name)
    assert sorted(place.parent.parent.parent.glob("evil*")) == []


def test_without_space_nothing_is_left(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(source)
        patch.setattr("mst.model.adding.shutil.disk_usage", lambda _: usage._replace(free=5))
        assert "are free" in failed(capsys, "add", str(source))

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mst.model.adding.sha256", full)
        assert "No space left" in failed(capsys, "add", str(source))
    assert [each.name for each in place.iterdir() if each.suffix != ".lock"] == []
    assert cli.main(["models", "add", str(source)]) == 0


def test_two_that_add_the_same_model_make_one(source: Path, place: Path) -> None:
    from mst.errors import ModelError
    from mst.model.adding import claimed

    place.mkdir(parents=True)
    with claimed(place / "tiny"), pytest.raises(ModelError, match="another process"):
        add(source, None, place)


def test_a_model_of_a_hubs_cache_is_verified_by_its_names(
    tiny_model: Path, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = tmp_path / "cache/huggingface/hub/models--org--cached"
    snapshot, blobs = hub / "snapshots/abc", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for each in tiny_model.iterdir():
        name = git_hash(each)
        shutil.copy(each, blobs / name)
        (snapshot / each.name).symlink_to(f"../../blobs/{name}")

    assert hash_state(snapshot).source == "cache"
    assert cli.main(["models", "verify", "org/cached", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "cache"
    with (snapshot / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    assert "tokenizer.json is not what" in failed(capsys, "verify", "org/cached")
    (snapshot / "tokenizer.json").unlink()
    shutil.copy(tiny_model / "tokenizer.json", blobs)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/tokenizer.json")
    assert "whose name is no hash" in failed(capsys, "verify", "org/cached")


def test_a_model_without_hashes_says_how_to_get_them(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", "verify", str(source)]) == 2
    assert "mst models manifest" in capsys.readouterr().err
