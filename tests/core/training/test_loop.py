"""The loop on a tiny model: accumulation, evaluation, stopping, NaN, and an oracle."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mst.data.encode import Example
from mst.errors import TrainingError
from mst.training import checkpoint
from mst.training.adapters import decoder_layers
from mst.training.checkpoint import TrainState
from mst.training.loop import run
from mst.training.sealed_directory import remove

Begin = Callable[..., Any]


def trained_bytes(session: Any) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in session.model.parameters() if p.requires_grad]


def test_the_loss_falls_and_every_step_is_reported(begin: Begin, record: Any) -> None:
    outcome = run(begin(total_steps=24, learning_rate=1e-2), TrainState())

    assert outcome.ending == "done"
    assert [each.step for each in record.steps] == list(range(1, 25))
    assert record.steps[-1].loss < record.steps[0].loss * 0.9
    assert record.steps[3].tokens == 7 + 19 + 12 + 30 + 5 + 23 + 9


def test_accumulation_does_not_change_the_loss(begin: Begin, record: Any) -> None:
    run(begin(per_device_train_batch_size=4, steps_per_epoch=2, total_steps=6), TrainState())
    whole = [each.loss for each in record.steps]
    record.steps.clear()
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run(begin(**cut, steps_per_epoch=2, total_steps=6), TrainState())

    assert [each.loss for each in record.steps] == pytest.approx(whole, rel=1e-5)


SOME_LAYERS: dict[str, Any] = {"gradient_checkpointing": True, "checkpointed_layers": 1}


@pytest.mark.parametrize(
    "change", [{"packing": False}, {"gradient_checkpointing": True}, SOME_LAYERS], ids=str
)
def test_layout_and_checkpointing_do_not_change_the_loss(
    begin: Begin, record: Any, change: dict[str, Any]
) -> None:
    run(begin(), TrainState())
    plain = [each.loss for each in record.steps]
    record.steps.clear()
    run(begin(**change), TrainState())

    assert [each.loss for each in record.steps] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"tuner": "full"},
        {"tuner": "qlora", "quantization": "nf4"},
        {"lora_dropout": 0.3},
        {"blocks": True},
        {"shares": True},
    ],
    ids=str,
)
def test_gradients_are_the_same_whichever_layers_are_recomputed(
    begin: Begin, how: dict[str, Any]
) -> None:
    def trained(**change: Any) -> list[bytes]:
        session = begin(total_steps=3, **how, **change)
        run(session, TrainState())
        return trained_bytes(session)

    assert trained(**SOME_LAYERS) == trained()


def test_only_the_first_layers_are_computed_twice(begin: Begin) -> None:
    session = begin(total_steps=1, gradient_accumulation_steps=1, **SOME_LAYERS)
    calls: dict[int, int] = {}
    layers = decoder_layers(session.model)
    for place, layer in enumerate(layers):
        inner: Any = layer
        inner.mlp.register_forward_pre_hook(
            lambda *_, place=place: calls.update({place: calls.get(place, 0) + 1})
        )
    run(session, TrainState())

    assert len(layers) == 2
    assert calls == {0: 2, 1: 1}


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_variants_of_lora_train(begin: Begin, record: Any, variant: dict[str, Any]) -> None:
    run(begin(**variant, total_steps=20, learning_rate=1e-2), TrainState())

    assert record.steps[-1].loss < record.steps[0].loss


def test_full_tuning_trains_every_weight(begin: Begin) -> None:
    session = begin(tuner="full", total_steps=4, weight_decay=0.1)
    before = trained_bytes(session)
    run(session, TrainState())
    after = trained_bytes(session)

    assert len(before) == len(list(session.model.parameters()))
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_the_best_and_the_newest_checkpoints_are_kept(
    begin: Begin, examples: list[Example], record: Any
) -> None:
    # Other answers to the same prompts: the surer of its own the model is, the worse they get.
    held_out = []
    for each in examples[1:4]:
        answer = [label if label < 0 else (label + 1) % 6000 for label in each.labels]
        ids = [
            token if label < 0 else label
            for token, label in zip(each.input_ids, answer, strict=True)
        ]
        held_out.append(Example(array("i", ids), array("i", answer), each.row))
    session = begin(
        val=held_out, total_steps=16, learning_rate=0.03, eval_steps=2, save_steps=2,
        save_total_limit=2, lr_scheduler_type="constant", warmup_ratio=0.0,
    )  # fmt: skip
    outcome = run(session, TrainState())
    losses = {each.step: each.eval_loss for each in record.evaluations}
    best = min(losses, key=lambda step: losses[step])
    kept = {each.name for each in checkpoint.listed(session.checkpoints)}

    assert outcome.state.best_step == best
    assert best < 14
    assert kept == {f"step-{step:08d}" for step in (best, 14, 16)}


def test_early_stopping_stops(begin: Begin, examples: list[Example], record: Any) -> None:
    session = begin(
        val=examples[:2], total_steps=50, learning_rate=0.5, eval_steps=1,
        early_stopping_patience=2, lr_scheduler_type="constant", warmup_ratio=0.0,
    )  # fmt: skip
    outcome = run(session, TrainState())

    assert outcome.ending == "early"
    assert outcome.state.step < 50
    assert outcome.state.worse_evaluations == 2


@pytest.mark.parametrize(
    "how", [{"blocks": False}, {"blocks": True}, {"async_save": True, **SOME_LAYERS}], ids=str
)
def test_a_wish_to_stop_saves_and_resume_ends_byte_identical(
    begin: Begin, how: dict[str, Any]
) -> None:
    # Blocks of 40 tokens hold several of the rows each, and an epoch has two steps of them.
    options: dict[str, Any] = {"total_steps": 8, "lora_dropout": 0.1, "save_steps": 100}
    options |= {"max_length": 40, **how}
    whole = begin(**options)
    run(whole, TrainState())
    stops = iter([False] * 3 + [True])
    cut = begin(**options, stop=lambda: next(stops))
    outcome = run(cut, TrainState())

    assert outcome.ending == "interrupted"
    assert outcome.state.step == 3

    resumed = begin(**options)
    found = checkpoint.newest_whole(resumed.checkpoints)
    # The uninterrupted run saved its last step in the same directory.
    remove(checkpoint.checkpoint_path(resumed.checkpoints, 8))
    found = checkpoint.newest_whole(resumed.checkpoints)
    assert found is not None
    state = checkpoint.restore(
        found, resumed.model, resumed.optimizer, resumed.names, resumed.device
    )
    run(resumed, state)

    assert trained_bytes(resumed) == trained_bytes(whole)
    assert trained_bytes(resumed) != trained_bytes(cut)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(begin: Begin) -> None:
    import torch

    session = begin(total_steps=8, save_steps=100)
    good: list[list[bytes]] = []

    def poison_at_the_fourth() -> bool:
        if len(good) == 3:
            with torch.no_grad():
                session.model.get_input_embeddings().weight.fill_(float("nan"))
        good.append(trained_bytes(session))
        return False

    session = session.__class__(**(vars(session) | {"stop_asked": poison_at_the_fourth}))
    with pytest.raises(TrainingError, match="not finite at step 4"):
        run(session, TrainState())
    found = checkpoint.newest_whole(session.checkpoints)
    fresh = begin()
    assert found is not None
    checkpoint.load_weights(found, fresh.model)

    assert found.name == "step-00000003"
    assert trained_bytes(fresh) == good[3]


def test_losses_equal_the_trainer_of_transformers(
    begin: Begin, examples: list[Example], record: Any, tmp_path: Path
) -> None:
    """HF Trainer as oracle: same rows in the same order, same adapters, same schedule."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from mst.training.order import epoch_order

    same: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7}
    session = begin(**same, steps_per_epoch=1, total_steps=6, warmup_ratio=0.2)
    theirs = begin()
    rows = [examples[i] for epoch in range(6) for i in epoch_order(7, 42, epoch)]
    run(session, TrainState())

    class Logged(TrainerCallback):
        losses: list[float] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    def pad(batch: list[Example]) -> dict[str, Any]:
        import torch

        width = max(len(each.input_ids) for each in batch)

        def filled(values: Any, fill: int) -> list[int]:
            return [*values, *[fill] * (width - len(values))]

        return {
            "input_ids": torch.tensor([filled(each.input_ids, 0) for each in batch]),
            "labels": torch.tensor([filled(each.labels, -100) for each in batch]),
            "attention_mask": torch.tensor(
                [filled([1] * len(each.input_ids), 0) for each in batch]
            ),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), **same, max_steps=6, learning_rate=1e-3, logging_steps=1,
        lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.0, report_to=[], seed=0,
        save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = InOrder(model=theirs.model, args=arguments, train_dataset=rows, data_collator=pad,
                      callbacks=[Logged()])  # fmt: skip
    trainer.train()

    ours = [each.loss for each in record.steps]
    assert Logged.losses == pytest.approx(ours, abs=1e-5)
