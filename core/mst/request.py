"""What the user asks for. Flags, YAML keys, help texts and error hints all come from here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

DEVICE_AUTO = "auto"
# What comes with mst for `--task`; each is also a command: `mst dpo` is `mst train --task dpo`.
TASKS = ("sft", "pt", "dpo", "kto", "orpo", "simpo", "rm", "grpo")


def option(
    default: Any,
    help: str,
    *,
    group: str,
    choices: tuple[str, ...] = (),
    or_count: bool = False,
    aliases: tuple[str, ...] = (),
    metavar: str = "",
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field that carries what a flag, a YAML key and the docs need.

    Args:
        default: value when neither YAML nor flag names it; None means "the planner decides".
        help: one line, without the default.
        group: heading in `--help`.
        choices: accepted strings; empty accepts all.
        or_count: a whole number from 1 on is accepted beside them.
        aliases: names that peers use for the same thing (notes on ms-swift, LLaMA-Factory, TRL).
        metavar: what the help shows for the value.
        at_least: smallest accepted number.
        above: number that the value must exceed.
        below: number that the value must stay under.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "or_count": or_count,
        "aliases": aliases,
        "metavar": metavar,
        "at_least": at_least,
        "above": above,
        "below": below,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainRequest:
    """Everything `mst train` and `mst plan` can be asked; None leaves the choice to the planner."""

    model: str | None = option(
        None,
        "model directory, GGUF file, or a name looked up in local places only",
        group="what",
        aliases=("model_name_or_path", "base_model"),
        metavar="PATH|NAME",
    )
    model_signature: str | None = option(
        None,
        "signature of the model's directory (OpenSSF model signing), verified before it is used",
        group="what",
        metavar="FILE",
    )
    model_public_key: str | None = option(
        None, "public key (PEM) of who has signed the model", group="what", metavar="FILE"
    )
    dataset: tuple[str, ...] = option(
        (),
        "data files, directories or globs; PATH#1000 takes the first 1000 rows, PATH#~1000 draws"
        " 1000",
        group="what",
        aliases=("dataset_path", "train_file"),
        metavar="PATH",
    )
    dataset_info: str | None = option(
        None,
        "LLaMA-Factory's dataset_info.json, or its directory; --dataset may then name data in it",
        group="data",
        aliases=("dataset_dir",),
        metavar="FILE|DIR",
    )
    columns: tuple[str, ...] = option(
        (),
        "what columns are, where their names don't say it: question=prompt",
        group="data",
        metavar="COLUMN=ROLE",
    )
    key_file: str | None = option(
        None,
        "key of encrypted data (.mst) and runs, made by mst data keygen; readable by you alone",
        group="data",
        metavar="FILE",
    )
    passphrase_file: str | None = option(
        None,
        "their passphrase: a file of yours, or /dev/fd/N; else it is asked for",
        group="data",
        metavar="FILE",
    )
    pkcs11: str | None = option(
        None,
        "key of encrypted data on a token, as pkcs11:token=LABEL;object=KEY; ?pin-source=file:/PATH"
        " holds the PIN, else it is asked for; ?module-path=/PATH is the token's library",
        group="data",
        metavar="URI",
    )
    on_bad_row: str = option(
        "error",
        "a row that can't be used ends the command, or is left out, counted and reported",
        group="data",
        choices=("error", "skip"),
    )
    val_dataset: tuple[str, ...] = option(
        (),
        "what is held out, instead of a share of --dataset; named as --dataset is",
        group="data",
        aliases=("eval_dataset", "val_file"),
        metavar="PATH",
    )
    device: str = option(
        DEVICE_AUTO,
        "auto, a backend's name, or name:index",
        group="what",
        metavar="NAME",
    )
    nproc_per_node: int | None = option(
        None,
        "devices of each machine to train on, one process each; default: what the plan finds best",
        group="what",
        aliases=("num_processes", "num_devices"),
        at_least=1,
    )
    nnodes: int = option(1, "machines that share the job", group="what", at_least=1)
    node_rank: int = option(0, "which of them this one is, from 0", group="what", at_least=0)
    master_addr: str | None = option(
        None, "address of machine 0, where all meet", group="what", metavar="HOST"
    )
    master_port: int = option(29500, "port there", group="what", at_least=1)
    output_dir: str | None = option(
        None, "run directory; default runs/<date>-<model>", group="what", metavar="DIR"
    )
    models_dir: tuple[str, ...] = option(
        (), "further places where a model name is looked up", group="what", metavar="DIR"
    )
    tuner: str = option(
        "auto",
        "what is trained",
        group="method",
        choices=("auto", "lora", "qlora", "full"),
        aliases=("tuner_type", "train_type", "sft_type", "finetuning_type"),
    )
    task: str = option(
        "sft",
        "what it is trained for: sft, pt (plain text), dpo, kto, orpo, simpo, rm (reward model),"
        " grpo (rewards), or a plugin's",
        group="objective",
        aliases=("stage", "rlhf_type"),
        metavar="NAME",
    )
    beta: float | None = option(
        None,
        "strength of the reference (dpo, kto; default 0.1; grpo has none), of the odds ratio (orpo;"
        " 0.1), or scale of the rewards (simpo; 2)",
        group="objective",
        aliases=("pref_beta", "rlhf_beta"),
        above=0,
    )
    loss_type: str | None = option(
        None,
        "of dpo: sigmoid (default), hinge or ipo; of grpo: dapo (default), grpo or dr_grpo",
        group="objective",
        aliases=("pref_loss",),
        metavar="NAME",
    )
    label_smoothing: float = option(
        0.0,
        "share of preferences taken to be the wrong way round (dpo with sigmoid, simpo)",
        group="objective",
        aliases=("dpo_label_smoothing",),
        at_least=0,
        below=0.5,
    )
    simpo_gamma: float = option(
        0.5, "margin that simpo wants between the rewards", group="objective", at_least=0
    )
    rpo_alpha: float = option(
        0.0,
        "weight of the better answer's likelihood, added to dpo",
        group="objective",
        aliases=("pref_ftx",),
        at_least=0,
    )
    desirable_weight: float = option(
        1.0,
        "weight of desirable answers in kto",
        group="objective",
        aliases=("kto_chosen_weight",),
        above=0,
    )
    undesirable_weight: float = option(
        1.0,
        "weight of undesirable answers in kto",
        group="objective",
        aliases=("kto_rejected_weight",),
        above=0,
    )
    precompute_ref_log_probs: bool = option(
        False,
        "of dpo: compute what the model says before training once, at the start; kept in memory",
        group="objective",
    )
    reward_funcs: tuple[str, ...] = option(
        (),
        "of grpo: what judges answers: exact_match, exact_match_folded, json_valid, or"
        " FILE.py:FUNCTION",
        group="objective",
        metavar="NAME|FILE",
    )
    reward_weights: tuple[str, ...] = option(
        (),
        "of grpo: factor of each of --reward-funcs; default 1",
        group="objective",
        metavar="NUMBER",
    )
    num_generations: int = option(
        8, "of grpo: answers that are sampled to each prompt", group="objective", at_least=2
    )
    max_completion_length: int = option(
        256, "of grpo: longest sampled answer in tokens", group="objective", at_least=1
    )
    temperature: float = option(
        1.0, "of grpo: at which answers are sampled", group="objective", above=0
    )
    quant_bits: int | None = option(
        None,
        "bits of the frozen weights under adapters: 4 (NF4) or 8; default 4 with qlora",
        group="method",
        choices=("4", "8"),
        aliases=("quantization_bit",),
    )
    lora_rank: int = option(
        8, "inner dimension r of LoRA", group="method", aliases=("lora_r",), at_least=1
    )
    lora_alpha: float = option(
        16.0, "LoRA's scale is alpha / r (alpha / sqrt(r) with rsLoRA)", group="method", above=0
    )
    lora_dropout: float = option(
        0.0, "dropout before LoRA's first matrix", group="method", at_least=0, below=1
    )
    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "layers that get an adapter: names, or all-linear",
        group="method",
        aliases=("lora_target", "lora_target_modules"),
        metavar="NAME",
    )
    use_rslora: bool = option(False, "rank-stabilised LoRA", group="method")
    use_dora: bool = option(False, "weight-decomposed LoRA", group="method")
    init_lora_weights: str = option(
        "auto",
        "adapters begin as ever, or with what quantization has lost (qera); auto: qera on 4 bits",
        group="method",
        choices=("auto", "default", "qera"),
        aliases=("init_weights",),
    )
    max_steps: int | None = option(
        None, "stop after so many optimizer steps", group="length", at_least=1
    )
    num_train_epochs: float = option(
        3.0,
        "passes over the training rows",
        group="length",
        aliases=("num_epochs", "epochs"),
        above=0,
    )
    per_device_train_batch_size: int | None = option(
        None,
        "rows a micro-batch on one device",
        group="length",
        aliases=("micro_batch_size", "batch_size"),
        at_least=1,
    )
    gradient_accumulation_steps: int | None = option(
        None, "micro-batches an optimizer step", group="length", at_least=1
    )
    max_length: int | None = option(
        None,
        "longest row in tokens; of `mst plan`, max finds what fits",
        group="data",
        aliases=("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len"),
        at_least=2,
    )
    packing: bool = option(
        False,
        "fill blocks of max_length tokens with whole rows; the batch sizes count blocks then",
        group="data",
        aliases=("sample_packing", "neat_packing"),
    )
    streaming: bool = option(
        False,
        "read and tokenize rows of .jsonl files when a step needs them: for sets beyond memory",
        group="data",
    )
    truncation_strategy: str = option(
        "delete",
        "rows longer than max_length are left out, or cut at the right or left",
        group="data",
        choices=("delete", "right", "left"),
    )
    train_on: str = option(
        "assistant",
        "turns that carry loss: every assistant turn, the last one, or all text",
        group="data",
        choices=("assistant", "last", "all"),
    )
    template: str | None = option(
        None,
        "a Jinja chat template instead of the model's own: a file, or chatml, llama3, gemma, phi3",
        group="data",
        aliases=("chat_template", "chat_template_path"),
        metavar="NAME|FILE",
    )
    val_size: float = option(
        0.05,
        "rows held out: a share below 1, else a number; 0 for none",
        group="data",
        aliases=("val_set_size", "split_dataset_ratio"),
        at_least=0,
    )
    label_accuracy: str = option(
        "auto",
        "accuracy over the set of answers before and after; auto: when the answers are few",
        group="data",
        choices=("auto", "on", "off"),
    )
    dp_epsilon: float | None = option(
        None,
        "experimental: differential privacy of the tuned weights with this ε, of LoRA alone",
        group="privacy",
        above=0,
    )
    dp_delta: float | None = option(
        None,
        "chance that ε does not hold; default a tenth of 1 / units",
        group="privacy",
        above=0,
        below=1,
    )
    dp_unit: str | None = option(
        None,
        "what is protected: all rows with the same value in this column (patient_id); default each"
        " row",
        group="privacy",
        metavar="COLUMN",
    )
    learning_rate: float | None = option(None, "peak learning rate", group="optimizer", above=0)
    optim: str = option(
        "auto",
        "AdamW with moments in float32, in 8 bits, or in 8 bits that spill to the host",
        group="optimizer",
        choices=("auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
        aliases=("optimizer",),
    )
    lr_scheduler_type: str = option(
        "cosine",
        "shape of the learning rate after warm-up",
        group="optimizer",
        choices=("cosine", "linear", "constant"),
        aliases=("lr_scheduler",),
    )
    warmup_ratio: float = option(
        0.03, "share of the steps over which it rises", group="optimizer", at_least=0, below=1
    )
    weight_decay: float = option(0.0, "AdamW's weight decay", group="optimizer", at_least=0)
    adam_beta1: float = option(0.9, "AdamW's first beta", group="optimizer", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's second beta", group="optimizer", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", group="optimizer", above=0)
    max_grad_norm: float = option(
        1.0, "gradients are scaled down to this norm; 0 for never", group="optimizer", at_least=0
    )
    memory_budget: str | None = option(
        None,
        "memory of each device that the plan may take at the most, such as 20GB or 20GiB; on a CPU,"
        " of the machine",
        group="memory",
        metavar="SIZE",
    )
    dtype: str = option(
        "auto",
        "dtype of the matrix products",
        group="memory",
        choices=("auto", "bfloat16", "float16", "float32"),
        aliases=("torch_dtype",),
    )
    gradient_checkpointing: str = option(
        "auto",
        "recompute activations to save memory: of all layers, or of the first so many; auto: of as"
        " few as will fit",
        group="memory",
        choices=("auto", "on", "off"),
        or_count=True,
        metavar="auto|on|off|N",
    )
    activation_offloading: str = option(
        "auto",
        "keep what recomputed layers need in the host's memory, on accelerators; auto: where"
        " nothing fits without it",
        group="memory",
        choices=("auto", "on", "off"),
    )
    torch_compile: str = option(
        "auto",
        "compile the decoder's layers; auto: where that costs less time than it saves",
        group="memory",
        choices=("auto", "on", "off"),
    )
    chunked_cross_entropy: str = option(
        "auto",
        "logits of a few hundred labels at a time, wherever the model's own are known to be those",
        group="memory",
        choices=("auto", "off"),
    )
    prefix_sharing: str = option(
        "auto",
        "what rows of a micro-batch begin with alike is computed once, wherever the model computes"
        " the same then",
        group="memory",
        choices=("auto", "off"),
    )
    padding_free: str = option(
        "auto",
        "rows lie end to end in the lines of a micro-batch, of models that keep them apart; off:"
        " each is padded to the longest",
        group="memory",
        choices=("auto", "off"),
    )
    block_attention: str = option(
        "auto",
        "on a CPU, attention as products of blocks of positions, instead of torch's own kernel",
        group="memory",
        choices=("auto", "off"),
    )
    fused_adamw: str = option(
        "auto",
        "on a CPU, AdamW's update of a weight in one kernel of torch",
        group="memory",
        choices=("auto", "off"),
    )
    attn_implementation: str = option(
        "auto",
        "attention of transformers: auto, or one that the backend offers",
        group="memory",
        aliases=("attn_impl", "flash_attn"),
        metavar="NAME",
    )
    deepspeed: str = option(
        "auto",
        "how ZeRO cuts the job over devices: auto, off, zero1, zero2, zero3, zero2_offload,"
        " zero3_offload, or a DeepSpeed JSON file",
        group="memory",
        metavar="STAGE|FILE",
    )
    offload_dir: str | None = option(
        None,
        "directory on a local disk for what ZeRO-3 offloads, instead of the host's memory",
        group="memory",
        metavar="DIR",
    )
    on_oom: str = option(
        "retry",
        "out of memory: once more from the last checkpoint with the next smaller plan, halve the"
        " micro-batch and go on from the step, or stop and say what to lower",
        group="memory",
        choices=("retry", "shrink", "stop"),
    )
    threads: int | None = option(None, "CPU threads of the worker", group="memory", at_least=1)
    logging_steps: int = option(1, "write metrics every so many steps", group="run", at_least=1)
    eval_steps: int | None = option(
        None,
        "loss on the held-out rows every so many steps; default each epoch",
        group="run",
        at_least=1,
    )
    save_steps: int | None = option(
        None, "checkpoint every so many steps; default each epoch", group="run", at_least=1
    )
    async_save: str = option(
        "auto",
        "write checkpoints beside the steps that follow, from a copy; auto: where it fits",
        group="run",
        choices=("auto", "on", "off"),
    )
    save_total_limit: int = option(
        2, "newest checkpoints kept, beside the best", group="run", at_least=1
    )
    early_stopping_patience: int | None = option(
        None,
        "stop after so many evaluations without a better loss, and take the best checkpoint",
        group="run",
        at_least=1,
    )
    load_best_model_at_end: bool = option(
        False, "the result is the checkpoint with the best held-out loss", group="run"
    )
    encrypt_run: bool = option(
        False,
        "weights and optimizer states in the run directory are encrypted, with --key-file or"
        " --passphrase-file",
        group="run",
    )
    seed: int = option(42, "seed of split, order, adapters and dropout", group="run", at_least=0)
    resume: str | None = option(
        None,
        "continue the run in output_dir from its newest whole checkpoint, or from this one",
        group="run",
        aliases=("resume_from_checkpoint",),
        metavar="last|PATH",
    )
    jail: str = option(
        "auto",
        "what keeps the job off every network: the strongest layer that this machine gives, or"
        " one of its kinds",
        group="seal",
        choices=("auto", "off", "namespace", "broker", "seccomp"),
    )
    jail_reason: str | None = option(
        None, "why the jail is off; recorded with the run", group="seal", metavar="TEXT"
    )
    allow_net: tuple[str, ...] = option(
        (),
        "networks of the job's other machines, such as 10.0.0.0/24",
        group="seal",
        metavar="CIDR",
    )


def fields() -> dict[str, dataclasses.Field[Any]]:
    """Return every option by its canonical name, in the order of the help."""
    return {each.name: each for each in dataclasses.fields(TrainRequest)}


def alias_names() -> dict[str, str]:
    """Return peers' names for our options: alias to canonical name."""
    return {alias: name for name, each in fields().items() for alias in each.metadata["aliases"]}
