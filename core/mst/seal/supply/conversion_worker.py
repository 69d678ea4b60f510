"""Run as `python -m mst.seal.supply.conversion_worker JOB`: read tensors from pickles, no code."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst import serial
from mst.durable import sha256
from mst.errors import Interrupted, ModelError
from mst.extensions import hide_extensions, hide_packages
from mst.model.sizes import text_part
from mst.seal.supply.conversion import REPORT, ConversionJob, ConversionReport
from mst.seal.supply.model_files import read_bounded_json
from mst.worker_process import StopAsked, die_with_parent, guarded

if TYPE_CHECKING:
    import torch

# What checkpoints of Lightning and other trainers put their weights under.
_NESTED = ("state_dict", "model", "module")
# A pickle of tensors' names and shapes: 1,000 tensors take about 150 KB.
_MOST_PICKLE_BYTES = 256 << 20


def work(job: ConversionJob) -> None:
    """Write the job's weights as safetensors, compare every tensor, and write a report.

    Raises:
        ModelError: a file holds more than tensors, is damaged, or was not written as it is.
    """
    source, target = Path(job.source), Path(job.target)
    ties = _ties(source)
    sources: dict[str, str] = {}
    places: dict[str, str] = {}
    tied: dict[str, str] = {}
    ignored: list[str] = []
    total = 0
    for number, name in enumerate(job.weights, 1):
        tensors, others = read_tensors(source / name)
        ignored += others
        kept, left = _untied(tensors, ties)
        tied |= left
        file = _file_name(job, number)
        _write(kept, target / file)
        _compare(kept, target / file)
        if twice := places.keys() & kept.keys():
            raise ModelError(f"{source}: {sorted(twice)[0]} stands in two of its weight files.")
        places |= dict.fromkeys(kept, file)
        sources[name] = sha256(source / name)
        total += sum(each.numel() * each.element_size() for each in kept.values())
    if len(job.weights) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    report = ConversionReport(sources, len(places), total, tied, tuple(sorted(set(ignored))))
    (target / REPORT).write_text(serial.dumps(report), encoding="utf-8")


def _file_name(job: ConversionJob, number: int) -> str:
    if job.adapter:
        return "adapter_model.safetensors"
    if len(job.weights) == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{len(job.weights):05d}.safetensors"


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of a file of `torch.save`, and the names of what else is in it.

    torch's restricted unpickler builds tensors, numbers, strings and containers; at any other name
    it stops before that is imported (`weights_only=True`; safe from torch 2.6 on, CVE-2025-32434).

    Raises:
        ModelError: the file asks for anything else, is damaged, or unpacks to more than it is.
    """
    import pickle

    import torch

    _check_container(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of pickles that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise ModelError(_refusal(path, str(error))) from None
    # What the reader raises at bytes that nobody foresaw is up to them.
    except Exception as error:
        raise ModelError(
            f"{path} can't be read as weights ({type(error).__name__}): it is damaged, cut off, or"
            " no file of torch.save. Nothing of it was run. Copy it again from the source."
        ) from None
    weights = _weights_in(path, loaded)
    tensors = {name: each for name, each in weights.items() if isinstance(each, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no tensors by name, so no weights.")
    size = path.stat().st_size
    for name, each in tensors.items():
        if each.layout != torch.strided or each.is_quantized or each.device.type != "cpu":
            raise ModelError(f"{path}: {name} is no plain tensor, which safetensors can't hold.")
        # A view may claim any shape over a few bytes; writing it out would fill a disk.
        if max(each.numel() * each.element_size(), each.untyped_storage().nbytes()) > size:
            raise ModelError(f"{path}: {name} claims more bytes than the file has. It is no model.")
    return tensors, [str(name) for name in weights if name not in tensors]


def _weights_in(path: Path, loaded: Any) -> Mapping[str, Any]:
    import torch

    if not isinstance(loaded, Mapping):
        raise ModelError(f"{path} holds a {type(loaded).__name__}, no tensors by name.")
    inner: Mapping[str, Any] = loaded
    for key in _NESTED:
        if not any(isinstance(each, torch.Tensor) for each in inner.values()):
            found = inner.get(key)
            inner = found if isinstance(found, Mapping) else inner
    if not all(isinstance(name, str) for name in inner):
        raise ModelError(f"{path} names its tensors by something else than text.")
    return inner


def _is_zip(path: Path) -> bool:
    return zipfile.is_zipfile(path)


def _check_container(path: Path) -> None:
    """Refuse a zip file that is packed, as torch's never is, or whose pickle is oversized."""
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelError(f"{path} is a damaged zip file ({type(error).__name__}).") from None
    for each in entries:
        large = each.filename.endswith(".pkl") and each.file_size > _MOST_PICKLE_BYTES
        if each.compress_type != zipfile.ZIP_STORED or large:
            raise ModelError(
                f"{path} unpacks to more than it is, as torch's own files never do. Nothing of it"
                " was read. Copy it again from the source."
            )


def _refusal(path: Path, message: str) -> str:
    asked = ""
    for mark in (
        "Unsupported global: GLOBAL ",
        "Unsupported class ",
        "Trying to load unsupported GLOBAL ",
    ):
        if mark in message:
            asked = message.split(mark, 1)[1].split()[0][:80]
    what = (
        f"asks for {asked!r} to be called"
        if asked.isprintable() and asked
        else "holds more than tensors"
    )
    return (
        f"{path} {what} when it is read, so it is a program and not just weights. Nothing of it was"
        " run. Don't load it with anything else; get the model as safetensors from its source."
    )


def _ties(source: Path) -> bool:
    """Return whether config.json says that the output head is the embedding."""
    path = source / "config.json"
    config = read_bounded_json(path) if path.is_file() else {}
    return isinstance(config, dict) and text_part(config).get("tie_word_embeddings") is True


def _untied(
    tensors: Mapping[str, torch.Tensor], ties: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return tensors that share no memory, as safetensors wants them, and which were left out.

    Only an output head that config.json ties is left out: the model's class makes it again. Any
    other shared tensor is written twice, because nobody here knows that its class would.
    """
    kept: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    owner: dict[int, str] = {}
    # The head comes last, so that it is the one that is left out.
    for name in sorted(tensors, key=lambda each: (each.endswith("lm_head.weight"), each)):
        each = tensors[name]
        first = owner.setdefault(each.untyped_storage().data_ptr(), name)
        same = first != name and _same_view(tensors[first], each)
        if same and ties and name.endswith("lm_head.weight"):
            tied[name] = first
            continue
        whole = each.is_contiguous() and each.untyped_storage().nbytes() == (
            each.numel() * each.element_size()
        )
        kept[name] = (
            each.detach()
            if first == name and whole
            else each.detach().clone(memory_format=_contiguous())
        )
    return {name: kept[name] for name in sorted(kept)}, tied


def _contiguous() -> Any:
    import torch

    return torch.contiguous_format


def _same_view(this: torch.Tensor, that: torch.Tensor) -> bool:
    return (this.data_ptr(), this.shape, this.stride(), this.dtype) == (
        that.data_ptr(), that.shape, that.stride(), that.dtype
    )  # fmt: skip


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"cannot write {path.name}: {str(error)[:200]}. Nothing was left."
        ) from None


def _compare(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Read the written file again and compare every bit, so that NaN equals NaN."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name, each in tensors.items():
            found = file.get_tensor(name) if name in names else None
            same = (
                found is not None
                and (found.dtype, found.shape) == (each.dtype, each.shape)
                and torch.equal(_bytes(found), _bytes(each))
            )
            if not same:
                raise ModelError(
                    f"{name} was not written as it is. Nothing was left; the disk may be bad."
                )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    StopAsked()
    hide_extensions()
    hide_packages()
    job = serial.from_json(ConversionJob, json.loads(argv[0]))

    def stopped() -> None:
        try:
            work(job)
        except KeyboardInterrupt:
            raise Interrupted("stopped; nothing was written.") from None

    return guarded(stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
