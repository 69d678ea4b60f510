"""Pickled weights as safetensors: what is checked before a process of its own reads them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mst import serial
from mst.durable import seal_directory
from mst.errors import EXIT_INTERRUPTED, Interrupted, ModelError, RunError
from mst.launch import how_it_ended, run_worker, worker_environment
from mst.quantities import gib
from mst.seal.supply.model_files import check_model_files, pickles_of, read_bounded_json

REPORT = "conversion.json"
# What a model directory may hold beside weights, by suffix; never code.
_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class ConversionJob:
    """What the worker does; all paths are absolute.

    Attributes:
        source: directory with pickled weights.
        weights: names of the files with weights, in their order.
        target: directory that the safetensors are written to.
        adapter: the weights are a PEFT adapter's.
    """

    source: str
    weights: tuple[str, ...]
    target: str
    adapter: bool


@dataclass(frozen=True)
class ConversionReport:
    """What was converted; lies in the new directory as JSON.

    Attributes:
        sources: pickled files, to their SHA-256.
        tensors: that were written, each compared with its source afterwards, bit by bit.
        weight_bytes: of all of them.
        tied: left out because config.json makes them the same as another: name to that name.
        ignored: entries of the pickle that are no tensors, such as a number of steps.
    """

    sources: Mapping[str, str]
    tensors: int
    weight_bytes: int
    tied: Mapping[str, str]
    ignored: tuple[str, ...]


def prepare_conversion(source: Path, output: Path) -> ConversionJob:
    """Check that a conversion can work, without torch, and return what to do.

    Raises:
        ModelError: no pickled weights there, a shard is missing, or the directory is not safe.
        RunError: the output is taken or too small.
    """
    if not source.is_dir():
        raise ModelError(f"{source} is no directory. Give the directory that holds the weights.")
    check_model_files(source)
    weights, adapter = _weights(source)
    target = output.absolute()
    if target.exists():
        raise RunError(f"--output {output} exists and is never overwritten. Pass a new directory.")
    place = next(each for each in target.parents if each.exists())
    if not os.access(place, os.W_OK):
        raise RunError(f"cannot write in {place}. Pass an --output that can be written.")
    needed = sum((source / each).stat().st_size for each in weights)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"the converted weights take {gib(needed)}; {place} has {gib(free)} free. Free some"
            " space, or pass --output on another disk."
        )
    part = target.with_name(f".{target.name}.part")
    return ConversionJob(str(source.absolute()), weights, str(part), adapter)


def convert(job: ConversionJob, environ: Mapping[str, str]) -> ConversionReport:
    """Run the worker in the foreground; the new directory appears when every tensor was compared.

    Raises:
        MstError: it failed, and has said why on standard error; nothing is left behind.
    """
    part = Path(job.target)
    target = part.with_name(part.name[1 : -len(".part")])
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _copy_side_files(Path(job.source), part)
        module = "mst.seal.supply.conversion_worker"
        code = run_worker(module, [serial.dumps(job)], worker_environment(environ, {}))
        if code == 0:
            report = serial.load(ConversionReport, part / REPORT)
            seal_directory(part, target)
            return report
    except OSError as error:
        raise RunError(
            f"cannot write {target}: {error.strerror}. Nothing was left there."
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{job.source} was not converted.")
    raise ModelError(f"{job.source} was not converted: {how_it_ended(code)}. Nothing was written.")


def _weights(source: Path) -> tuple[tuple[str, ...], bool]:
    if (source / _INDEX).is_file():
        index = read_bounded_json(source / _INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        names = sorted({str(each) for each in places.values()}) if isinstance(places, dict) else []
        if not names or any(each != Path(each).name for each in names):
            raise ModelError(
                f"{source / _INDEX} is damaged, or names files outside of its directory."
                " Copy it again from the source."
            )
        missing = [each for each in names if not (source / each).is_file()]
        if missing:
            raise ModelError(
                f"{source} lacks {len(missing)} of {len(names)} weight files: {missing[0]} …"
                " Copy the missing files from the source."
            )
        return tuple(names), False
    for name, adapter in (("pytorch_model.bin", False), ("adapter_model.bin", True)):
        if (source / name).is_file():
            return (name,), adapter
    found = tuple(each.name for each in pickles_of(source))
    if len(found) == 1:
        return found, False
    if found:
        raise ModelError(
            f"{source} holds {len(found)} pickles and no {_INDEX} that says which are the weights"
            f" ({', '.join(found[:4])} …). Leave only the weights there."
        )
    done = " Its weights are safetensors already." if list(source.glob("*.safetensors")) else ""
    raise ModelError(f"{source} holds no pickled weights (*.bin, *.pt, *.pth, *.ckpt).{done}")


def _copy_side_files(source: Path, target: Path) -> None:
    for each in sorted(source.iterdir()):
        wanted = each.suffix.lower() in _SIDE_SUFFIXES or each.name.startswith("LICENSE")
        if wanted and each.is_file() and not each.name.endswith(".index.json"):
            shutil.copyfile(each, target / each.name)
