"""Make the demo's data set from banking77: `python ci/make_demo_data.py train.csv test.csv`.

The rule, fixed before anything was trained: the first 12 intents in alphabetical order (upper and
lower case alike); training rows whose text is also in the test file are left out; both files are
shuffled with seed 0; the first 1,200 training rows and the first 20 test rows of each intent are
kept.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

INTENTS = 12
TRAIN_ROWS = 1200
TEST_ROWS_AN_INTENT = 20
SEED = 0
SYSTEM_PROMPT = "Name the customer's intent."
OUTPUT_DIR = Path(__file__).resolve().parents[1] / "core/mst/demo/banking77"

Pair = tuple[str, str]


def read(path: Path) -> list[Pair]:
    """Return (text, intent) of each row; white space around a text is dropped."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]


def same(text: str) -> str:
    """Return what two texts share when they differ only in case and white space."""
    return " ".join(text.casefold().split())


def shuffled(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs in an order that depends on them and on the seed only."""
    # A hash, because Python may change how random.shuffle works.
    return sorted(pairs, key=lambda p: hashlib.sha256(f"{SEED}\t{p[0]}\t{p[1]}".encode()).digest())


def select(train: list[Pair], test: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return the demo's training and test rows by the rule above."""
    intents = set(sorted({intent for _, intent in train}, key=str.casefold)[:INTENTS])
    tested = {same(text) for text, _ in test}
    chosen_train = [p for p in train if p[1] in intents and same(p[0]) not in tested]
    chosen_test: list[Pair] = []
    taken: Counter[str] = Counter()
    for text, intent in shuffled(p for p in test if p[1] in intents):
        if taken[intent] < TEST_ROWS_AN_INTENT:
            taken[intent] += 1
            chosen_test.append((text, intent))
    return shuffled(chosen_train)[:TRAIN_ROWS], chosen_test


def write(path: Path, pairs: Iterable[Pair]) -> None:
    """Write one conversation a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text, intent in pairs:
            messages = [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": text},
                {"role": "assistant", "content": intent.replace("_", " ")},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def main() -> None:
    """Read both CSV files and write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("train", type=Path, help="train.csv of banking77")
    parser.add_argument("test", type=Path, help="test.csv of banking77")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    arguments = parser.parse_args()
    train, test = select(read(arguments.train), read(arguments.test))
    write(arguments.output_dir / "train.jsonl", train)
    write(arguments.output_dir / "test.jsonl", test)
    print(f"{len(train)} training rows, {len(test)} test rows in {arguments.output_dir}")


if __name__ == "__main__":
    main()
