"""What transformers' Trainer and those who build on it call by the same names."""

from __future__ import annotations

from mst.foreign.draft import Draft, number, truth

# Same update, other kernels or another place for the moments.
_ADAMW = {
    "adamw": "",
    "adamw_torch": "",
    "adamw_hf": "",
    "adamw_torch_fused": "",
    "adamw_apex_fused": "",
    "adamw_torch_npu_fused": "",
    "adamw_torch_xla": "",
    "paged_adamw": "moments in float32, but they don't spill to the host",
    "paged_adamw_32bit": "moments in float32, but they don't spill to the host",
}
_OTHER_8_BITS = {"adamw_torch_8bit": "bitsandbytes' 8 bits, where theirs are torchao's"}
_OPTIMIZERS = {
    **dict.fromkeys(_ADAMW, "adamw_torch"),
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def optimizer(draft: Draft, *keys: str) -> None:
    """Translate the optimizer's name and its numbers."""
    key, value = draft.spelt(*keys), draft.take(*keys)
    if value is not None and str(value) in _OPTIMIZERS:
        draft.keep(
            "optim", _OPTIMIZERS[str(value)], key, {**_ADAMW, **_OTHER_8_BITS}.get(str(value), "")
        )
    elif value is not None:
        draft.drop(key, "mst trains with AdamW only", "changes", "optim")
    for name in (
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"
    ):  # fmt: skip
        given = draft.take(name)
        if given is not None:
            draft.keep(name, given, name)


def schedule(draft: Draft, key: str = "lr_scheduler_type") -> None:
    """Translate the shape of the learning rate and its warm-up."""
    shape = draft.take(key)
    shape = None if shape is None else str(shape).lower().removeprefix("schedulertype.")
    if shape in ("cosine_with_restarts", "constant_with_warmup"):
        note = "with its one restart it is the same" if shape.startswith("cosine") else ""
        draft.keep("lr_scheduler_type", shape.split("_")[0], key, note)
    elif shape in ("cosine", "linear", "constant"):
        draft.keep("lr_scheduler_type", shape, key)
    elif shape is not None:
        draft.drop(
            key, "mst's schedules are cosine, linear and constant", "changes", "lr_scheduler_type"
        )
    if shape == "constant":
        # transformers' `constant` never warms up, whatever else is set.
        draft.take("warmup_ratio", "warmup_steps")
        draft.keep("warmup_ratio", 0, key, "their constant has no warm-up")
    else:
        _warmup(draft)


def _warmup(draft: Draft) -> None:
    steps, ratio = draft.take("warmup_steps"), draft.take("warmup_ratio")
    count, total = number(steps), number(draft.given.get("max_steps"))
    if count is None or count <= 0:
        if ratio is not None:
            draft.keep("warmup_ratio", ratio, "warmup_ratio")
    elif count < 1:  # transformers 5: a share
        draft.keep("warmup_ratio", count, "warmup_steps")
    elif total and total > count:
        draft.keep("warmup_ratio", round(count / total, 6), "warmup_steps", "a share of max_steps")
    else:
        draft.drop(
            "warmup_steps",
            "mst takes a share: set warmup_ratio to this number / the steps that `mst plan` prints",
            "changes",
            "warmup_ratio",
        )


def lengths(draft: Draft) -> None:
    """Translate how long is trained, and on how many rows at once."""
    steps = draft.take("max_steps")
    if steps is not None and (number(steps) or 0) > 0:  # -1 is "by epochs"
        draft.keep("max_steps", steps, "max_steps")
    for key, name in (
        ("num_train_epochs", "num_train_epochs"),
        ("per_device_train_batch_size", "per_device_train_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        value = draft.take(key)
        if value is not None:
            draft.keep(name, value, key)


def cadence(draft: Draft) -> None:
    """Translate how often is logged, evaluated and saved, and which checkpoint is the result."""
    for what, keys in (
        ("save", ("save_strategy",)),
        ("eval", ("eval_strategy", "evaluation_strategy")),
    ):
        _steps(draft, what, *keys)
    logging = draft.take("logging_steps")
    if logging is not None and (number(logging) or 0) >= 1:
        draft.keep("logging_steps", int(number(logging) or 1), "logging_steps")
    elif logging is not None:
        draft.drop("logging_steps", "mst logs every so many steps, not at a share of all")
    limit = draft.take("save_total_limit")
    if limit is not None and (number(limit) or 0) >= 1:
        draft.keep("save_total_limit", limit, "save_total_limit")
    elif limit is not None:
        draft.drop("save_total_limit", "mst keeps 2 checkpoints unless told a number")
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        value = draft.take(name)
        if value is not None and (name.startswith("early") or truth(value)):
            draft.keep(name, value, name)
    metric = draft.take("metric_for_best_model")
    if metric is not None and str(metric) not in ("loss", "eval_loss"):
        draft.drop(
            "metric_for_best_model", "the best checkpoint is that of the least loss", "changes"
        )
    _resume(draft)


def _steps(draft: Draft, what: str, *keys: str) -> None:
    key, strategy = draft.spelt(*keys), draft.take(*keys)
    steps = draft.take(f"{what}_steps")
    if strategy is not None and str(strategy) in ("no", "False"):
        draft.drop(key, f"mst {'saves' if what == 'save' else 'evaluates'} each epoch at least")
    elif strategy is not None and str(strategy) in ("epoch", "best"):
        draft.drop(key, "each epoch is what mst does unless told otherwise")
    elif steps is not None and (number(steps) or 0) >= 1:
        draft.keep(f"{what}_steps", int(number(steps) or 1), f"{what}_steps")
    elif steps is not None:
        draft.drop(f"{what}_steps", "mst counts steps, not shares of all steps")


def _resume(draft: Draft) -> None:
    if draft.take("resume_from_checkpoint") not in (None, False, "false", "False"):
        draft.drop(
            "resume_from_checkpoint",
            "a checkpoint of another tool can't be continued; a run of mst goes on with --resume",
            "check",
        )


def precision(draft: Draft) -> None:
    """Translate the dtype of the matrix products."""
    bf16 = draft.take("bf16", "bfloat16")
    fp16 = draft.take("fp16", "float16")
    draft.take("bf16_full_eval", "fp16_full_eval", "fp16_opt_level", "fp16_backend")
    if str(bf16) == "auto":
        draft.keep("dtype", "auto", "bf16")
    elif bf16 is not None and (truth(bf16) or str(bf16) == "full"):
        draft.keep("dtype", "bfloat16", draft.spelt("bf16", "bfloat16"))
    elif fp16 is not None and truth(fp16):
        draft.keep("dtype", "float16", draft.spelt("fp16", "float16"))


def checkpointing(draft: Draft) -> None:
    """Translate whether activations are computed again; where it isn't said, mst plans it."""
    value = draft.take("gradient_checkpointing", "activation_checkpointing")
    if value is not None:
        on = truth(value) or str(value) in ("offload", "offload_disk", "unsloth")
        draft.keep("gradient_checkpointing", "on" if on else "off", "gradient_checkpointing")
