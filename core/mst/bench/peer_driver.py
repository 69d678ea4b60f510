"""Trains in a peer: run as `PYTHON -I peer_driver.py NAME DESCRIPTOR` in the peer's environment.

Nothing of mst is imported: that environment has none. The job comes as JSON through a descriptor of
anonymous memory, for it holds rows as token ids; so what the peer prints and the text of its errors
go nowhere, and what is written has figures alone. `NAME version` says which peer is there.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = 5
_VERSIONED = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "unsloth_zoo")


def versions(name: str) -> dict[str, str]:
    """Return the versions of a peer and of what it stands on.

    Raises:
        PackageNotFoundError: the peer isn't here.
    """
    found = {"python": platform.python_version(), name: version(name)}
    for each in _VERSIONED:
        try:
            found[each] = version(each)
        except PackageNotFoundError:
            continue
    return found


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers' Trainer is told, by its names."""
    return {
        "output_dir": f"{job['place']}/output", "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"], "max_steps": job["steps"],
        "learning_rate": job["rate"], "lr_scheduler_type": job["schedule"],
        "warmup_steps": job["warmup_steps"], "weight_decay": job["weight_decay"],
        "adam_beta1": job["betas"][0], "adam_beta2": job["betas"][1],
        "adam_epsilon": job["epsilon"], "max_grad_norm": job["max_grad_norm"],
        "logging_steps": 1, "save_strategy": "no", "report_to": ["none"],
        "bf16": job["dtype"] == "bfloat16", "fp16": job["dtype"] == "float16",
        "use_cpu": job["device"] == "cpu", "seed": job["seed"], "disable_tqdm": True,
        "dataloader_pin_memory": job["device"] != "cpu", "dataloader_num_workers": 0,
    }  # fmt: skip


class Notes:
    """What is noted of a run, step by step, and written where somebody waits for it."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Begin with nothing."""
        self.job = job
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.begin: float | None = None
        self.peak_memory_bytes = 0
        self.eval_loss: float | None = None

    def step(self, loss: float) -> None:
        """Note the end of a step, and add a line as `mst train` does to its metrics."""
        now = time.perf_counter()
        place = len(self.ends)
        seconds = now - (self.ends[-1] if self.ends else self.begin or now)
        self.ends.append(now)
        self.losses.append(loss)
        known = self.job.get("tokens")
        if known is None or place >= len(known):
            return
        line = {
            "step": place + 1, "loss": loss, "tokens": sum(known[: place + 1]),
            "tokens_per_second": known[place] / max(seconds, 1e-9),
        }  # fmt: skip
        with open(self.job["metrics"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def callback(self) -> Any:
        """Return a callback of transformers' Trainer that notes."""
        from transformers import TrainerCallback

        notes = self

        class Note(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if notes.begin is None:
                    notes.begin = time.perf_counter()

            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
            ) -> None:
                # The loss has been read from the device by now, so its step is over.
                if "loss" in logs:
                    notes.step(float(logs["loss"]))

            def on_train_end(
                self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
            ) -> None:
                notes.peak_memory_bytes = peak_memory(notes.job["device"])
                notes.eval_loss = held_out(model, notes.job.get("val_rows") or ())

        return Note()


def peak_memory(device: str) -> int:
    """Return the most memory that this process had: of torch's allocator, or on a CPU of its own.

    `ru_maxrss` would count what was there before this interpreter was started (getrusage(2)).
    """
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def held_out(model: Any, rows: Any) -> float | None:
    """Return the mean loss of a label over rows, one row at a time; None of none."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for ids, labels in rows:
            device = next(model.parameters()).device
            logits = model(input_ids=torch.tensor([ids], device=device)).logits
            if logits is None:
                return None
            wanted = torch.tensor(labels[1:], device=device)
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1].float(), wanted, ignore_index=-100, reduction="sum"
            )
            total += float(loss)
            count += int((wanted != -100).sum())
    return total / count if count else None


def trl(job: dict[str, Any], notes: Notes) -> None:
    """Train with TRL."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"],
        local_files_only=True, use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(
        job["model"], local_files_only=True, trust_remote_code=False
    )
    supervised(job, notes, model, tokenizer)


def unsloth(job: dict[str, Any], notes: Notes) -> None:
    """Train with unsloth, which loads the model its own way and changes TRL's trainer."""
    # Read as it is imported: it counts its uses at its makers', and keeps kernels in the folder.
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": job["place"]}
    import torch
    from unsloth import FastLanguageModel

    # Of adapters it loads the model that they name, and trains them on.
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job["adapter"], dtype=getattr(torch, job["dtype"]), load_in_4bit=False,
        max_seq_length=job["max_length"], use_gradient_checkpointing=job["checkpointing"],
        attn_implementation=job["attention"], local_files_only=True, trust_remote_code=False,
    )  # fmt: skip
    supervised(job, notes, model, tokenizer)


def supervised(job: dict[str, Any], notes: Notes, model: Any, tokenizer: Any) -> None:
    """Train with TRL's SFTTrainer; where it packs, its blocks have the longest row's tokens."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    packing = bool(job.get("packing"))

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if packing:  # which rows meet is known here alone
                mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
                notes.tokens.append(int(ids.numel() if mask is None else mask.sum()))
                notes.labels.append(int((inputs["labels"] != -100).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = SFTConfig(
        **arguments(job), packing=packing, completion_only_loss=True,
        gradient_checkpointing=job["checkpointing"],
        max_length=job["max_length"] if packing else None,
    )  # fmt: skip
    rows = [
        {"input_ids": ids, "completion_mask": [int(label != -100) for label in labels]}
        for ids, labels in job["rows"]
    ]
    trainer = InOrder(
        model=model, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[notes.callback()],
    )  # fmt: skip
    trainer.train()


def packed(
    rows: list[tuple[list[int], list[int]]], length: int
) -> list[tuple[list[int], list[int], int]]:
    """Return blocks as LLaMA-Factory's `packing` makes them, and how many tokens are of rows.

    Its own knapsack fills them; rows in one see each other, and the rest is 0 without a label.
    """
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for row in rows:
        by_length.setdefault(len(row[0]), []).append(row)
    blocks = []
    for lengths in greedy_knapsack([len(ids) for ids, _ in rows], length):
        taken = [by_length[each].pop() for each in lengths]
        gap = length + 1 - sum(lengths)
        ids = [token for row in taken for token in row[0]] + [0] * gap
        labels = [label for row in taken for label in row[1]] + [-100] * gap
        blocks.append((ids, labels, sum(lengths)))
    return blocks


def llamafactory(job: dict[str, Any], notes: Notes) -> None:
    """Train with LLaMA-Factory, from rows that are tokens already."""
    from datasets import Dataset
    from llamafactory.train import tuner
    from llamafactory.train.sft import workflow

    given_rows = job["rows"]
    if job.get("packing"):
        blocks = packed(given_rows, job["max_length"])
        given_rows = [(ids, labels) for ids, labels, _ in blocks]
        for start in range(0, len(blocks), job["batch"]):
            taken = blocks[start : start + job["batch"]]
            notes.tokens.append(sum(filled for *_, filled in taken))
            notes.labels.append(sum(label != -100 for _, each, _ in taken for label in each))
    rows = Dataset.from_list(
        [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            for ids, labels in given_rows
        ]
    )
    # It reads rows from files alone, and these must not become one.
    workflow.get_dataset = lambda *_, **__: {"train_dataset": rows}
    kernel = {"sdpa": "sdpa", "flash_attention_2": "fa2"}.get(job["attention"], "disabled")
    given = arguments(job) | {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all",
        "adapter_name_or_path": job["adapter"], "model_name_or_path": job["model"],
        "dataset": "rows", "cutoff_len": job["max_length"], "disable_shuffling": True,
        "disable_gradient_checkpointing": not job["checkpointing"], "flash_attn": kernel,
    }  # fmt: skip
    tuner.run_exp(given, callbacks=[notes.callback()])


def ms_swift(job: dict[str, Any], notes: Notes) -> None:
    """Train with ms-swift, from rows that are tokens already."""
    from swift.arguments import SftArguments
    from swift.pipelines.train.sft import SwiftSft

    rows = [{"input_ids": ids, "labels": labels} for ids, labels in job["rows"]]

    class OnRows(SwiftSft):  # type: ignore[misc]
        def _prepare_dataset(self) -> Any:
            # It reads rows from files alone, and these must not become one.
            return rows, None

        def train(self, trainer: Any) -> Any:
            trainer.add_callback(notes.callback())
            return super().train(trainer)

    given = SftArguments(
        **arguments(job), model=job["model"], model_type=swift_type(job["model"]),
        template="dummy", adapters=[job["adapter"]], tuner_type="lora", dataset=["rows"],
        torch_dtype=job["dtype"], attn_impl=job["attention"], max_length=job["max_length"],
        gradient_checkpointing=job["checkpointing"], train_dataloader_shuffle=False,
        # It would ask ModelScope's hub whether the model is the newest.
        check_model=False, add_version=False,
    )  # fmt: skip
    OnRows(given).run()


def swift_type(model: str) -> str | None:
    """Return the type by which ms-swift is to load a model; None where it needs not be told.

    By a model's architecture it may find several, which differ in their templates: rows that are
    tokens have none, so the first that is loaded in the usual way will do.
    """
    from swift.model import MODEL_MAPPING, ModelLoader, get_matched_model_meta
    from swift.model.model_meta import get_matched_model_types

    if get_matched_model_meta(model) is not None:
        return None
    config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    found = get_matched_model_types(config.get("architectures"))
    return next((each for each in found if MODEL_MAPPING[each].loader is ModelLoader), None)


TOOLS = {"trl": trl, "llamafactory": llamafactory, "ms-swift": ms_swift, "unsloth": unsloth}


def train(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Train with a peer, and return what is to be known of it."""
    import torch

    torch.set_num_threads(job["threads"])
    notes = Notes(job)
    TOOLS[name](job, notes)
    return {
        "begin": notes.begin, "ends": notes.ends, "losses": notes.losses, "tokens": notes.tokens,
        "labels": notes.labels, "peak_memory_bytes": notes.peak_memory_bytes,
        "eval_loss": notes.eval_loss, "versions": versions(name),
    }  # fmt: skip


def place_of(error: BaseException) -> str:
    """Return where an error was raised: of its text only that of a missing module can be told."""
    if isinstance(error, ImportError):
        return f": {error}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    file = frames[-1].filename.rpartition("site-packages/")[2]
    return f" in {file}, line {frames[-1].lineno}"


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def main() -> int:
    """Do what the command line says, and return the exit code."""
    name, what = sys.argv[1:3]
    if what == "version":
        try:
            print(json.dumps(versions(name)))
        except PackageNotFoundError:
            print(json.dumps({}))
        return 0
    told = os.fdopen(os.dup(2), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with os.fdopen(int(what), encoding="utf-8") as file:
        file.seek(0)
        job = json.load(file)
    try:
        found = train(name, job)
    # The text of an error may quote a row; its kind and place say nothing of it.
    except BaseException as error:
        kind = "OutOfMemory" if ran_out(error) else "PeerFailed"
        print(f"{kind}: {name} ended by {type(error).__name__}{place_of(error)}", file=told)
        return OUT_OF_MEMORY if ran_out(error) else 1
    part = Path(f"{job['result']}.part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(job["result"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
