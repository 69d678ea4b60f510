"""`mst models convert`: every tensor as it was, and nothing of a pickle is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from mst import cli
from mst.errors import ModelError, RunError
from mst.model.facts import read_facts
from mst.seal.supply.conversion import prepare_conversion
from mst.seal.supply.conversion_worker import read_tensors, work


@pytest.fixture
def pickled(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model as a pickle, its head tied as torch ties it."""
    import torch
    from safetensors.torch import load_file

    path = shutil.copytree(tiny_model, tmp_path / "pickled")
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(OrderedDict(weights), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    (path / "modeling_x.py").write_text("raise SystemExit")
    return path


def converted(source: Path, output: Path) -> Path:
    """Do the worker's part in this process: a start of Python each would take most of the time."""
    job = prepare_conversion(source, output)
    Path(job.target).mkdir(parents=True)
    work(job)
    return Path(job.target)


def tensors_of(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: each
        for path in sorted(directory.glob("*.safetensors"))
        for name, each in load_file(path).items()
    }


def test_a_pickled_model_is_converted_as_a_whole(
    pickled: Path, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    output = tmp_path / "output"
    code = cli.main(["model", "convert", str(pickled), "--output", str(output)])
    said = capfd.readouterr()
    before, after = tensors_of(tiny_model), tensors_of(output)
    report = json.loads((output / "conversion.json").read_text())

    assert (code, said.err) == (0, "")
    assert "each compared with its source" in said.out
    assert report["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_facts(output).parameters == read_facts(tiny_model).parameters
    assert not list(output.glob("*.py")) + list(output.glob("*.bin"))
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
    assert cli.main(["model", "convert", str(pickled), "--output", str(output)]) == 1
    assert "never overwritten" in capfd.readouterr().err


def test_shards_are_converted_one_by_one(pickled: Path, tiny_model: Path, tmp_path: Path) -> None:
    import torch

    weights = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    names = sorted(weights)
    places: dict[str, str] = {}
    for number in (0, 1):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        part = {name: weights[name] for name in names[number::2]}
        torch.save(part, pickled / file, _use_new_zipfile_serialization=bool(number))
        places |= dict.fromkeys(part, file)
    (pickled / "pytorch_model.bin").unlink()
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    output = converted(pickled, tmp_path / "output")
    after = tensors_of(output)
    index = json.loads((output / "model.safetensors.index.json").read_text())

    assert set(index["weight_map"]) == set(after)
    assert set(tensors_of(tiny_model)) <= set(after)
    assert all(torch.equal(weights[name], after[name]) for name in after)

    (pickled / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match="lacks 1 of 2 weight files"):
        prepare_conversion(pickled, tmp_path / "other")


def test_every_bit_and_every_shape_is_kept(tmp_path: Path) -> None:
    import torch

    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    weights = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "transposed": base.t(), "view": base[1], "again": base, "scalar": torch.tensor(3),
        "half": base.half(), "brain": base.bfloat16(), "bool": base > 3, "empty": torch.empty(0, 3),
    }  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"epoch": 3, "state_dict": weights, "note": "x"}, source / "last.ckpt")
    after = tensors_of(converted(source, tmp_path / "output"))

    assert after.keys() == weights.keys()
    for name, each in weights.items():
        assert (after[name].dtype, after[name].shape) == (each.dtype, each.shape)
        assert torch.equal(after[name].nan_to_num(7), each.nan_to_num(7)), name
    assert after["nan"][1].signbit()


def test_an_adapter_is_converted(finished_run: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from mst.seal.supply.model_files import check_adapter_files

    source = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    weights = load_file(source / "adapter_model.safetensors")
    torch.save(weights, source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    output = converted(source, tmp_path / "output")
    shutil.copy(source / "adapter_config.json", output)
    check_adapter_files(output)

    assert tensors_of(output).keys() == weights.keys()


class Attack:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def legacy_tar(path: Path, payload: bytes) -> None:
    """Write torch's oldest form, a tar, whose pickles ran in spite of weights_only."""
    (path.parent / "pickle").write_bytes(payload)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            archive.add(path.parent / "pickle", name)


@pytest.mark.parametrize("form", ["plain", "zip", "legacy", "tar", "nested"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, form: str) -> None:
    import torch

    marker, path = tmp_path / "marker", tmp_path / "source" / "pytorch_model.bin"
    path.parent.mkdir()
    attack = {"w": torch.ones(2), "x": Attack(marker)}
    if form == "plain":
        path.write_bytes(pickle.dumps(Attack(marker)))
    elif form == "tar":
        legacy_tar(path, pickle.dumps(Attack(marker)))
    else:
        whole = {"state_dict": attack} if form == "nested" else attack
        torch.save(whole, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(ModelError, match="Nothing of it was run"):
        read_tensors(path)

    assert not marker.exists()
    if form != "tar":  # the attack works where nobody is careful
        torch.load(path, weights_only=False) if form != "plain" else pickle.loads(path.read_bytes())

        assert marker.exists()


def test_the_command_refuses_it_in_words_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    source = tmp_path / "source"
    source.mkdir()
    torch.save({"w": Attack(tmp_path / "marker")}, source / "pytorch_model.bin")
    code = cli.main(["model", "convert", str(source), "--output", str(tmp_path / "output")])
    said = capfd.readouterr().err

    assert code == 1
    assert "system' to be called" in said
    assert "Traceback" not in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source"]


def test_files_that_lie_about_their_size_are_refused(tmp_path: Path) -> None:
    import torch

    huge = tmp_path / "huge.bin"
    torch.save({"w": torch.ones(1).expand(1 << 40)}, huge)
    with pytest.raises(ModelError, match="claims more bytes"):
        read_tensors(huge)

    packed = tmp_path / "packed.bin"
    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as old, zipfile.ZipFile(packed, "w", 8) as new:
        for each in old.namelist():
            new.writestr(each, old.read(each))
    with pytest.raises(ModelError, match="unpacks to more than it is"):
        read_tensors(packed)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"not a pickle", b"\x80\x05"]
)
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "w.bin").write_bytes(data)
    with pytest.raises(ModelError, match=r"w\.bin"):
        read_tensors(tmp_path / "w.bin")


def test_every_cut_of_a_file_is_refused_in_words(tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.arange(64.0)}, tmp_path / "w.bin")
    data = (tmp_path / "w.bin").read_bytes()
    for length in range(1, len(data), 97):
        (tmp_path / "cut.bin").write_bytes(data[:length])
        with pytest.raises(ModelError):
            read_tensors(tmp_path / "cut.bin")


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd"])
def test_an_index_of_pickles_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside of its directory"):
        prepare_conversion(tmp_path, tmp_path / "output")


def test_what_stands_in_the_way_is_told_first(
    pickled: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="safetensors already"):
        prepare_conversion(tiny_model, tmp_path / "output")
    with pytest.raises(ModelError, match="no directory"):
        prepare_conversion(tmp_path / "nothing", tmp_path / "output")
    space = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: space)
    with pytest.raises(RunError, match="Free some space"):
        prepare_conversion(pickled, tmp_path / "output")
