"""What is trained on what: the model, the rows, the devices, and where the run goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="what")


@dataclass(frozen=True)
class JobOptions:
    """The group "what" of `mst.request.TrainRequest`."""

    model: str | None = _option(
        None,
        "model directory, GGUF file, or a name looked up in local places only",
        aliases=("model_name_or_path", "base_model"),
        metavar="PATH|NAME",
    )
    model_signature: str | None = _option(
        None,
        "signature of the model's directory (OpenSSF model signing), verified before it is used",
        metavar="FILE",
    )
    model_public_key: str | None = _option(
        None, "public key (PEM) of who has signed the model", metavar="FILE"
    )
    dataset: tuple[str, ...] = _option(
        (),
        "data files, directories or globs; PATH#1000 takes the first 1000 rows, PATH#~1000 draws"
        " 1000",
        aliases=("dataset_path", "train_file"),
        metavar="PATH",
    )
    device: str = _option("auto", "auto, a backend's name, or name:index", metavar="NAME")
    nproc_per_node: int | None = _option(
        None,
        "devices of each machine to train on, one process each; default: what the plan finds best",
        aliases=("num_processes", "num_devices"),
        at_least=1,
    )
    nnodes: int = _option(1, "machines that share the job", at_least=1)
    node_rank: int = _option(0, "which of them this one is, from 0", at_least=0)
    master_addr: str | None = _option(None, "address of machine 0, where all meet", metavar="HOST")
    master_port: int = _option(29500, "port there", at_least=1)
    output_dir: str | None = _option(
        None, "run directory; default runs/<date>-<model>", metavar="DIR"
    )
    models_dir: tuple[str, ...] = _option(
        (), "further places where a model name is looked up", metavar="DIR"
    )
