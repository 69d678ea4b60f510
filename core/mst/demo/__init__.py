"""The embedded data set, so that `mst train` with nothing else shows what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def demo_data() -> tuple[str, str]:
    """Return the paths of the training and the held-out rows."""
    directory = Path(__file__).parent / "banking77"
    return str(directory / "train.jsonl"), str(directory / "test.jsonl")


def demo_defaults() -> dict[str, Any]:
    """Return the recipe of the demo: options to use where the user named none and no data.

    One pass at a rate that suits so short a run; the test file is held out whole.
    """
    train, test = demo_data()
    return {
        "dataset": (train,),
        "val_dataset": (test,),
        "num_train_epochs": 1.0,
        "learning_rate": 2e-3,
    }
