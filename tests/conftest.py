"""A tiny model, tiny data and one finished run, for every test that needs a real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Installed for the process that quantizes; PEFT and transformers would import them here, and warn.
for name in ("torchao", "gptqmodel", "optimum"):
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]

DATA = Path(__file__).resolve().parent / "data"
ANSWERS = {"card": "my card is", "cash": "my cash is", "fee": "the fee is", "loan": "the loan is"}
DETAILS = ("late", "lost", "wrong", "gone", "old", "new", "too high", "too low", "here", "there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have slow tests: no process is left with one when others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def own_state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the audit log of tested commands out of the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_core_limit() -> Iterator[None]:
    """Keep commands that are called in this process from shutting its core dumps off for good.

    All that later tests start would have none either, whatever it did itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mst.cli.core_dumps_off", lambda: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers and random weights, and the tokenizer of MiniMind: 2 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tokenizers/minimind" / each, path)
    return path


@pytest.fixture(scope="session")
def tiny_model_with_context(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Return a function that copies the tiny model as one that reads so many tokens."""

    def copied(tokens: int) -> Path:
        path = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "tiny")
        config = json.loads((path / "config.json").read_text())
        changed = config | {"max_position_embeddings": tokens}
        (path / "config.json").write_text(json.dumps(changed))
        return path

    return copied


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations whose answer is one of four words."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{question} {detail}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for detail in DETAILS
        for answer, question in ANSWERS.items()
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(
    tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of `mst train` on the tiny model: 4 steps, 2 evaluations, checkpoints 2 and 4.

    Shared by the whole session: copy it before changing anything in it.
    """
    path = tmp_path_factory.mktemp("runs") / "tiny"
    options = {
        "model": tiny_model, "dataset": chat_rows, "output-dir": path, "device": "cpu",
        "max-steps": 4, "per-device-train-batch-size": 8, "gradient-accumulation-steps": 1,
        "eval-steps": 2, "save-steps": 2, "val-size": 8, "learning-rate": 0.01,
        "label-accuracy": "off", "threads": 1,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "mst", "train", *flags],
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture(scope="session")
def merged(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `mst merge` makes of `finished_run`. Shared: copy it before a change."""
    path = tmp_path_factory.mktemp("merged") / "model"
    done = subprocess.run(
        [sys.executable, "-m", "mst", "merge", str(finished_run), "--output-dir", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return path
