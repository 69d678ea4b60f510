"""Metrics, evaluations, checkpoints, and going on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="run")


@dataclass(frozen=True)
class RunOptions:
    """The group "run" of `mst.request.TrainRequest`."""

    logging_steps: int = _option(1, "write metrics every so many steps", at_least=1)
    eval_steps: int | None = _option(
        None, "loss on the held-out rows every so many steps; default each epoch", at_least=1
    )
    save_steps: int | None = _option(
        None, "checkpoint every so many steps; default each epoch", at_least=1
    )
    async_save: str = _option(
        "auto",
        "write checkpoints beside the steps that follow, from a copy; auto: where it fits",
        choices=("auto", "on", "off"),
    )
    save_total_limit: int = _option(2, "newest checkpoints kept, beside the best", at_least=1)
    early_stopping_patience: int | None = _option(
        None,
        "stop after so many evaluations without a better loss, and take the best checkpoint",
        at_least=1,
    )
    load_best_model_at_end: bool = _option(
        False, "the result is the checkpoint with the best held-out loss"
    )
    encrypt_run: bool = _option(
        False,
        "weights and optimizer states in the run directory are encrypted, with --key-file or"
        " --passphrase-file",
    )
    seed: int = _option(42, "seed of split, order, adapters and dropout", at_least=0)
    resume: str | None = _option(
        None,
        "continue the run in output_dir from its newest whole checkpoint, or from this one",
        aliases=("resume_from_checkpoint",),
        metavar="last|PATH",
    )
