"""What an export target is asked for and what it hands back: types only, the contract of a target.

The work is done by plugins that implement the `mst_export…` hooks (see `mst.hookspecs`). mst merges
the run, hands the merged model over, and compares what the target wrote with what was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mst.plan import Reason


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to.

    Attributes:
        model_dir: the merged model, as transformers stores it: config.json, safetensors, tokenizer
            and template. Before anything is merged, when the target is only asked for its plan, a
            directory with the same config and the same shapes.
        output_dir: empty directory that exists; the target writes there and nowhere else. "" when
            it is only asked for its plan.
        work_dir: a directory of this export's own that outlives a kill, for a target that goes on
            where it stopped; mst removes it in the end. It must hold no row.
        method: how numbers are chosen, as `--method` has it; "auto" is the target's best.
        bits: of a weight; None for the target's usual.
        group_size: weights that share a scale; None for the largest that the model allows.
        calibration: token ids of rows that the run was trained on. Private: they must reach no
            file, log or error.
        threads: CPU threads.
        environ: the process's environment, for a target that starts processes.
        tell: shows the user a line about what is being done.
        options: the target's own options as text, as in `--option name=value`.
        dtype: torch name of the merged model's, in which weights that stay whole are stored.
    """

    model_dir: str
    output_dir: str = ""
    work_dir: str = ""
    method: str = "auto"
    bits: int | None = None
    group_size: int | None = None
    calibration: Sequence[Sequence[int]] = field(default=(), repr=False)
    threads: int = 1
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    tell: Callable[[str], None] = field(default=_silent, repr=False)
    options: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass(frozen=True)
class Bounds:
    """How far a model may be from what was trained before its export counts as failed.

    Attributes:
        perplexity_ratio: its perplexity over the trained model's, on the same text, at most: of all
            tokens, and of those alone that the model was trained to predict.
        mean_kl: mean Kullback-Leibler divergence of the next token's distribution from the trained
            model's, in nats, at most.
        agreement: share of positions at which both find the same next token likeliest, at least.
        accuracy_loss: by how much the share of right answers may fall, beyond chance, where the
            run's data is a classification.
        exact: the weights must be those of the merged model, bit for bit.
        beats_rounding: the divergence must be below that of plain rounding to the same scheme.
        weight_error: norm of a weight's difference over its own norm, of each weight, at most; None
            for a method that moves scales between layers, as AWQ does.
    """

    perplexity_ratio: float
    mean_kl: float
    agreement: float
    accuracy_loss: float = 0.02
    exact: bool = False
    beats_rounding: bool = False
    weight_error: float | None = None


@dataclass(frozen=True)
class ExportPlan:
    """What a target will do with a model, said before any work is done.

    Attributes:
        scheme: in a few words, for people: "4 bits, groups of 64, GPTQ".
        bounds: that the result is held against.
        disk_bytes: of the artefact.
        memory_bytes: that making it takes at the peak, beside the libraries.
        calibrated: rows are needed.
        reasons: choices that were left open, and why each was made so.
        not_checked: what nobody can check here, to why: "loaded by TurboMind": "no GPU".
        serve: commands that serve the result, with {path} in the place of its directory.
        work_bytes: that lie beside the artefact on the disk while it is made, at the most.
        shares_merge: its weights are the merged model's files under a second name, so that they
            take the disk once.
    """

    scheme: str
    bounds: Bounds
    disk_bytes: int
    memory_bytes: int
    calibrated: bool = False
    reasons: tuple[Reason, ...] = ()
    not_checked: Mapping[str, str] = field(default_factory=dict)
    serve: tuple[str, ...] = ()
    work_bytes: int = 0
    shares_merge: bool = False


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        format: the target's name, as `mst_export_name` returns it.
        files: every file written, relative to `output_dir`, sorted.
        versions: of the libraries that made it.
        checked: what the target has checked itself, with the result as text.
    """

    format: str
    files: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    checked: Mapping[str, str] = field(default_factory=dict)
