"""Tiny random models of many architectures, and a way to hear whole answers."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mst.serve.asking import way_of
from mst.serve.constraint import Constrainer
from mst.serve.continuous import ContinuousEngine, Limits
from mst.serve.decoders import Served
from mst.serve.engine import Choice, EngineFailure, Prompt, Token
from mst.serve.row_adapters import RowAdapters

CPU = torch.device("cpu")
CONTEXT = 256
VOCABULARY = 256


def random_model(kind: str, attention: str = "sdpa", **options: Any) -> Any:
    """Return a model of an architecture with random weights."""
    import transformers

    untyped: Any = transformers
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = untyped.AutoConfig.for_model(kind, **shape | options)
    torch.manual_seed(0)
    # Twice the usual spread: answers that don't all end in one repeated token.
    model = untyped.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for each in model.parameters():
        if each.dim() > 1:
            each.data *= 2
    return model


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    return found


def transformers_answer(model: Any, ids: Sequence[int], new: int, **options: Any) -> list[int]:
    """Return the greedy answer of transformers' own `generate`."""
    found = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    answer: list[int] = found[0, len(ids) :].tolist()
    return answer


class Gate:
    """Holds an engine up before its next pass, so that tests need not be quicker than it."""

    def __init__(self, model: Any) -> None:
        self._open = threading.Event()
        self._handle = model.register_forward_pre_hook(lambda *_: self._pass())

    def _pass(self) -> None:
        assert self._open.wait(60)

    def shut(self) -> None:
        """Let no pass begin."""
        self._open.clear()

    def open(self) -> None:
        """Let passes begin."""
        self._open.set()

    def remove(self) -> None:
        """Open it for good."""
        self._open.set()
        self._handle.remove()


class Heard:
    """What an engine tells of one prompt."""

    def __init__(self, at_first: Callable[[], None] | None = None) -> None:
        """Call `at_first` in the engine's thread with the first token."""
        self.news: queue.Queue[Token | EngineFailure] = queue.Queue()
        self.ticket = 0
        self._at_first = at_first

    def told(self, news: Token | EngineFailure) -> None:
        """Be told by the engine."""
        at_first, self._at_first = self._at_first, None
        if at_first is not None:
            at_first()
        self.news.put(news)

    def next(self) -> Token:
        """Wait for a token."""
        found = self.news.get(timeout=60)
        if isinstance(found, EngineFailure):
            raise found
        return found

    def tokens(self) -> list[Token]:
        """Wait for the whole answer."""
        found = [self.next()]
        while found[-1].finish is None:
            found.append(self.next())
        return found

    def ids(self) -> list[int]:
        """Wait for the whole answer's tokens."""
        return [each.id for each in self.tokens()]


def ask(
    engine: ContinuousEngine,
    ids: Sequence[int],
    new: int = 12,
    adapter: str | None = None,
    caller: str = "",
    at_first: Callable[[], None] | None = None,
    **choice: Any,
) -> Heard:
    """Submit a prompt; greedy unless told otherwise."""
    heard = Heard(at_first)
    chosen = Choice(new, **{"temperature": 0.0} | choice)
    heard.ticket = engine.submit(Prompt(tuple(ids), chosen, adapter, caller), heard.told)
    return heard


Start = Callable[..., ContinuousEngine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start engines, and close them after the test."""
    engines: list[ContinuousEngine] = []

    def begin(
        model: Any,
        adapters: RowAdapters | None = None,
        constrainer: Constrainer | None = None,
        **limits: int,
    ) -> ContinuousEngine:
        served = Served(model, CPU, torch.float32, adapters or RowAdapters(model))
        way = way_of(served, CONTEXT)
        engine = ContinuousEngine(served, way.decoder, CONTEXT, Limits(**limits), constrainer)
        engines.append(engine)
        return engine

    yield begin
    for each in engines:
        each.close()


@pytest.fixture(scope="session")
def llama() -> Any:
    """A Llama that no test changes."""
    return random_model("llama")


@pytest.fixture
def gate(llama: Any, start: Start) -> Iterator[Gate]:
    """A gate before the Llama's passes, which is open until a test shuts it."""
    found = Gate(llama)
    found.open()
    yield found
    found.remove()


@pytest.fixture(scope="session")
def parrot_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the serving engine of tests/vendor/parrot is installed, as any package is."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    package = Path(__file__).parents[2] / "vendor" / "parrot"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, package],
        check=True,
        capture_output=True,
    )
    return target
