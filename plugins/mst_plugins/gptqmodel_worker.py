"""Run as `python -m mst_plugins.gptqmodel_worker JOB`: quantize a model with GPTQ or AWQ."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from mst import serial
from mst.durable import why_unwritten
from mst.errors import Interrupted, ModelError, MstError, RunError
from mst.extensions import hide_extensions, hide_packages
from mst.model.files import read_config
from mst.worker_process import StopAsked, die_with_parent, guarded
from mst_plugins.gptqmodel_job import Progress, QuantizeJob, rows_a_pass, rows_of_one_pass
from mst_plugins.gptqmodel_patches import patch, stop_noted
from mst_plugins.quantized_model import decoder_linears, faults, write_side_files
from mst_plugins.sealed_continuation import key_from_rows
from mst_plugins.silence import silence

# Killed after a layer and begun again, these come to the same bytes (GPTQ and AWQ; gptqmodel's AWQ
# fails on the last two); others begin anew.
_GO_ON = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")


def work(job: QuantizeJob, stop: StopAsked) -> None:
    """Fill the job's directory.

    Args:
        job: what is quantized, and how.
        stop: tells whether Ctrl-C has come.

    Raises:
        ModelError: gptqmodel does not know the architecture, failed, or wrote what it should not.
        RunError: the disk is full.
        Interrupted: the user stopped it after a layer.
    """
    with os.fdopen(job.calibration, encoding="utf-8") as file:
        file.seek(0)
        rows: list[list[int]] = json.load(file)
    key = key_from_rows(rows)
    linears = decoder_linears(Path(job.source))
    directory = Path(job.directory)
    # gptqmodel writes a folder of logs into the working directory, which may be the user's.
    os.chdir(Path(job.work_dir) / "tmp")
    try:
        with silence():
            dtype = _quantize(job, rows, key, stop)
        write_side_files(Path(job.source), directory, job.scheme, {"dtype": dtype})
    except MstError:
        raise
    except Exception as error:  # whatever gptqmodel thinks of an architecture
        raise _failure(job, error) from None
    if found := faults(directory, linears, job.scheme):
        raise ModelError(
            f"what gptqmodel wrote is no {job.scheme.layout} checkpoint: {found[0]}"
            f" ({len(found)} faults). Report it with the architecture of {job.source}."
        )


def _failure(job: QuantizeJob, error: Exception) -> MstError:
    """Return where gptqmodel failed; not its text, which may quote a row."""
    if reason := why_unwritten(error):
        return RunError(
            f"the disk of {job.directory} takes no more: {reason}. Free some space: the same"
            " command goes on where it can."
        )
    place = traceback.extract_tb(error.__traceback__)[-1]
    return ModelError(
        f"gptqmodel could not quantize {job.source} as {job.scheme.layout}:"
        f" {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}. Pass another"
        " --format, or --method rtn, which rounds without it."
    )


def _quantize(job: QuantizeJob, rows: list[list[int]], key: bytes, stop: StopAsked) -> str:
    """Write the weights, and return the dtype of those that are not quantized."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.looper.checkpoint import CheckpointStopped
    from gptqmodel.models.auto import MODEL_MAP

    kind = read_config(Path(job.source))["model_type"]
    if kind not in MODEL_MAP:
        raise ModelError(
            f"gptqmodel does not know the architecture {kind!r} of {job.source}. Export it with"
            " --method rtn, or --format merged."
        )
    torch.set_num_threads(job.threads)
    patch(key)
    stop_asked = stop_noted()
    goes_on = kind in _GO_ON
    model: Any = GPTQModel.load(job.source, _config(job, goes_on), trust_remote_code=False)
    if stop.raised:  # and lost, as in a destructor of what was being imported
        raise KeyboardInterrupt
    layers = model.model.config.get_text_config().num_hidden_layers

    def tell(layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized:
            line = json.dumps(serial.to_json(Progress(layer_idx + 1, layers)))
            os.write(job.progress, f"{line}\n".encode())

    model.layer_callback = tell
    awq = job.scheme.layout == "awq"
    given = rows_of_one_pass(rows) if awq else rows
    try:
        model.quantize(
            [{"input_ids": each, "attention_mask": [1] * len(each)} for each in given],
            batch_size=len(given) if awq else rows_a_pass(rows),
            calibration_data_min_length=1,
            # Left to itself, gptqmodel asks for CUDA.
            backend=BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH,
            checkpoint=_checkpoint(job, key) if goes_on else None,
        )
    except CheckpointStopped:
        raise Interrupted("stopped after a whole layer.") from None
    if stop_asked() or stop.raised:
        raise Interrupted("stopped after the last layer.")
    return _save(model, job)


def _config(job: QuantizeJob, goes_on: bool) -> Any:
    from gptqmodel import QuantizeConfig

    scheme = job.scheme
    return QuantizeConfig(
        quant_method=scheme.layout,
        format="gemm" if scheme.layout == "awq" else "gptq",
        bits=scheme.bits,
        group_size=scheme.group_size,
        sym=scheme.symmetric,
        desc_act=False,
        # Scales of least squared error; left to itself, gptqmodel takes a group's largest weight.
        mse=2.0 if scheme.layout == "gptq" else 0.0,
        device="cpu",
        # The default builds a C++ extension, which needs a compiler and 40 seconds.
        pack_impl="original",
        offload_to_disk=goes_on,
        offload_to_disk_path=str(Path(job.work_dir) / "tmp" / "offload"),
    )


def _checkpoint(job: QuantizeJob, key: bytes) -> Any:
    """Return where gptqmodel keeps finished layers; other rows or another scheme begin anew."""
    from gptqmodel import CheckpointConfig

    same = serial.dumps(replace(job, directory="", work_dir="", calibration=0, progress=0))
    name = hashlib.sha256(key + same.encode()).hexdigest()[:16]
    return CheckpointConfig(path=Path(job.work_dir) / name)


def _save(model: Any, job: QuantizeJob) -> str:
    """Save the weights, and nothing of what gptqmodel writes beside them: it names paths."""
    from safetensors.torch import load_file, save_file

    saved = Path(job.work_dir) / "tmp" / "saved"
    model.save(str(saved))
    for each in saved.glob("model*.safetensors"):
        # A run that went on writes the tensors in another order.
        save_file(load_file(each), Path(job.directory) / each.name, metadata={"format": "pt"})
    for each in saved.glob("model*.index.json"):
        shutil.copyfile(each, Path(job.directory) / each.name)
    return str(json.loads((saved / "config.json").read_text(encoding="utf-8"))["dtype"])


def main(argv: list[str]) -> int:
    """Do the job that the first argument describes."""
    die_with_parent()
    stop = StopAsked()
    hide_extensions()
    job = serial.from_json(QuantizeJob, json.loads(argv[0]))
    hide_packages(keep=("gptqmodel", "torchao"))
    return guarded(lambda: work(job, stop), stop=stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
