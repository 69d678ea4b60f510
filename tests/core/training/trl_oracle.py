"""Run as a script by test_objectives_trl: TRL trains on rows that are given, and logs each step.

`python trl_oracle.py SPECIFICATION RESULT`: JSON files. TRL is kept from tokenizing: it gets the
token ids that mst trains on, and its own collators, losses, optimizer and metrics do the rest.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

TRAINERS = {
    "dpo": ("trl", "DPO"),
    "kto": ("trl", "KTO"),
    "rm": ("trl", "Reward"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "simpo": ("trl.experimental.cpo", "CPO"),
    "grpo": ("trl", "GRPO"),
}


def columns(task: str, row: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the trainer's collator takes it.

    Args:
        task: of mst.
        row: prompt, chosen and rejected; or prompt, completion and label.
        before: the row before it in its batch, the last one before the first.
    """
    if task == "kto":
        return {
            "prompt_ids": row["prompt"],
            "completion_ids": row["completion"],
            "KL_completion_ids": before["completion"],
            "label": row["label"],
        }
    if task == "grpo":
        return row
    if task == "dpo":
        return {f"{key}_ids": row[key] for key in ("prompt", "chosen", "rejected")}
    whole = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    if task == "rm":
        return {f"{side}_ids": ids for side, ids in whole.items()}
    made: dict[str, Any] = {
        "prompt_input_ids": row["prompt"], "prompt_attention_mask": [1] * len(row["prompt"])
    }  # fmt: skip
    for side, ids in whole.items():
        made[f"{side}_input_ids"] = ids
        made[f"{side}_attention_mask"] = [1] * len(ids)
        made[f"{side}_labels"] = [-100] * len(row["prompt"]) + row[side]
    return made


def in_order(trainer: Any, rows: list[dict[str, Any]]) -> Any:
    """Return the trainer's class, made to take the rows as they are and in their order."""
    from torch.utils.data import SequentialSampler

    class InOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return {}

    return InOrder


def judged_already(trainer: Any) -> Any:
    """Return GRPO's trainer, made to learn from answers that were sampled and judged before."""
    import torch

    class Judged(trainer):  # type: ignore[misc]
        def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
            rows: list[dict[str, Any]] = inputs
            prompts = max(len(each["prompt"]) for each in rows)
            answers = max(len(each["completion"]) for each in rows)
            left = [prompts - len(each["prompt"]) for each in rows]
            right = [answers - len(each["completion"]) for each in rows]
            both = list(zip(rows, left, right, strict=True))
            made: dict[str, Any] = {
                "prompt_ids": [[0] * gap + each["prompt"] for each, gap, _ in both],
                "prompt_mask": [[0] * gap + [1] * (prompts - gap) for gap in left],
                "completion_ids": [each["completion"] + [0] * gap for each, _, gap in both],
                "completion_mask": [[1] * (answers - gap) + [0] * gap for gap in right],
                "advantages": [each["advantage"] for each in rows],
            }
            made = {name: torch.tensor(value) for name, value in made.items()}
            made["num_items_in_batch"] = made["completion_mask"].sum()
            ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
            mask = torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1)
            with torch.no_grad(), self.model.disable_adapter():
                said = self._get_per_token_logps_and_entropies(self.model, ids, mask, answers)
            return {**made, "ref_per_token_logps": said[0]}

    return Judged


def model_of(spec: dict[str, Any]) -> Any:
    """Return the model with fresh adapters, as mst's test makes it."""
    import torch

    from mst.request import TrainRequest
    from mst.training.adapters import load_model, lora_config, prepare_model

    torch.manual_seed(spec["seed"])
    pad = 0 if spec["task"] == "rm" else None
    cpu = torch.device("cpu")
    model = load_model(Path(spec["model"]), "float32", "sdpa", cpu, score_pad_token_id=pad)
    torch.manual_seed(0)
    return prepare_model(model, lora_config(TrainRequest(lora_rank=4, task=spec["task"])))


def train(spec: dict[str, Any], directory: Path) -> list[dict[str, float]]:
    """Train as one specification says, and return what was logged of each step."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    task, batch = spec["task"], spec["batch"]
    rows: list[dict[str, Any]] = []
    for first in range(0, len(spec["rows"]), batch):
        part = spec["rows"][first : first + batch]
        rows += [columns(task, row, part[i - 1]) for i, row in enumerate(part)]
    place, name = TRAINERS[task]
    module = importlib.import_module(place)
    only = {"max_length": 512}
    if task == "grpo":
        only = {"num_generations": 2, "steps_per_generation": 1}
    config = getattr(module, f"{name}Config")(
        output_dir=str(directory), per_device_train_batch_size=batch,
        num_train_epochs=1, learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, **only,
        remove_unused_columns=False, dataloader_pin_memory=False, seed=0, **spec["options"],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    made = in_order(getattr(module, f"{name}Trainer"), rows)
    more: dict[str, Any] = {}
    if task == "grpo":
        made, more = judged_already(made), {"reward_funcs": lambda **_: []}
    trainer = made(
        model=model_of(spec), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, **more,
    )  # fmt: skip
    trainer.train()
    return [each for each in trainer.state.log_history if "loss" in each]


def main(specification: str, result: str) -> None:
    """Train as each of several specifications says, and write what was logged."""
    import torch

    torch.set_num_threads(1)
    specs = json.loads(Path(specification).read_text(encoding="utf-8"))
    directory = Path(result).parent / "trl"
    logged = {case: train(spec, directory) for case, spec in specs.items()}
    Path(result).write_text(json.dumps(logged), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
