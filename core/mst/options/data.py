"""How rows are read, opened, cut and held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="data")


@dataclass(frozen=True)
class DataOptions:
    """The group "data" of `mst.request.TrainRequest`."""

    dataset_info: str | None = _option(
        None,
        "LLaMA-Factory's dataset_info.json, or its directory; --dataset may then name data in it",
        aliases=("dataset_dir",),
        metavar="FILE|DIR",
    )
    columns: tuple[str, ...] = _option(
        (),
        "what columns are, where their names don't say it: question=prompt",
        metavar="COLUMN=ROLE",
    )
    key_file: str | None = _option(
        None,
        "key of encrypted data (.mst) and runs, made by mst data keygen; readable by you alone",
        metavar="FILE",
    )
    passphrase_file: str | None = _option(
        None,
        "their passphrase: a file of yours, or /dev/fd/N; else it is asked for",
        metavar="FILE",
    )
    pkcs11: str | None = _option(
        None,
        "key of encrypted data on a token, as pkcs11:token=LABEL;object=KEY; ?pin-source=file:/PATH"
        " holds the PIN, else it is asked for; ?module-path=/PATH is the token's library",
        metavar="URI",
    )
    on_bad_row: str = _option(
        "error",
        "a row that can't be used ends the command, or is left out, counted and reported",
        choices=("error", "skip"),
    )
    val_dataset: tuple[str, ...] = _option(
        (),
        "what is held out, instead of a share of --dataset; named as --dataset is",
        aliases=("eval_dataset", "val_file"),
        metavar="PATH",
    )
    max_length: int | None = _option(
        None,
        "longest row in tokens; of `mst plan`, max finds what fits",
        aliases=("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len"),
        at_least=2,
    )
    packing: bool = _option(
        False,
        "fill blocks of max_length tokens with whole rows; the batch sizes count blocks then",
        aliases=("sample_packing", "neat_packing"),
    )
    streaming: bool = _option(
        False,
        "read and tokenize rows of .jsonl files when a step needs them: for sets beyond memory",
    )
    truncation_strategy: str = _option(
        "delete",
        "rows longer than max_length are left out, or cut at the right or left",
        choices=("delete", "right", "left"),
    )
    train_on: str = _option(
        "assistant",
        "turns that carry loss: every assistant turn, the last one, or all text",
        choices=("assistant", "last", "all"),
    )
    template: str | None = _option(
        None,
        "a Jinja chat template instead of the model's own: a file, or chatml, llama3, gemma, phi3",
        aliases=("chat_template", "chat_template_path"),
        metavar="NAME|FILE",
    )
    val_size: float = _option(
        0.05,
        "rows held out: a share below 1, else a number; 0 for none",
        aliases=("val_set_size", "split_dataset_ratio"),
        at_least=0,
    )
    label_accuracy: str = _option(
        "auto",
        "accuracy over the set of answers before and after; auto: when the answers are few",
        choices=("auto", "on", "off"),
    )
