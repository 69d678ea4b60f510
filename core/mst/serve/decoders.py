"""Passes through the model for many answers at once, or for each alone where it must be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mst.one_row import one_row, reads_half
from mst.serve.answers import Answer
from mst.serve.decode_step import step_of
from mst.serve.row_adapters import RowAdapters
from mst.training.adapters import under_adapters
from mst.training.loss import accepts, compute_in, last_logits

if TYPE_CHECKING:
    import torch

    from mst.serve.slots import Kept, Slots


# Mamba's forward pass has another name for what it keeps.
_CACHE_NAMES = ("past_key_values", "cache_params")


@dataclass(eq=False)
class Served:
    """A model and how it is run.

    Attributes:
        model: a causal language model of transformers, in evaluation mode.
        device: where it is.
        dtype: of products where PEFT has wrapped the model; float32 where nothing is cast.
        adapters: that rows choose from.
    """

    model: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    adapters: RowAdapters

    def __post_init__(self) -> None:
        """Look at the forward pass once: it takes longer than a small model's step."""
        import torch

        self._last = last_logits(self.model, self.device)
        self._reads_half = reads_half(self.model, self.device)
        self._known: dict[str, bool] = {}
        # Where products are cast, PEFT and autocast are part of each layer.
        plain = self.dtype == torch.float32 and not hasattr(self.model, "peft_config")
        self.steps = step_of(self.model, self.device) if plain else None

    def _accepts(self, name: str) -> bool:
        if name not in self._known:
            self._known[name] = accepts(self.model, name)
        return self._known[name]

    def logits(
        self, ids: Sequence[Sequence[int]], names: Sequence[str | None], **arguments: Any
    ) -> torch.Tensor:
        """Return the last column's logits (rows, vocabulary) of a pass; arguments as `outputs`."""
        found: torch.Tensor = self.outputs(ids, names, **arguments).logits[:, -1]
        return found

    def outputs(
        self, ids: Sequence[Sequence[int]], names: Sequence[str | None], **arguments: Any
    ) -> Any:
        """Return what a pass gives.

        Args:
            ids: tokens (rows, columns).
            names: each row's adapter.
            arguments: of the forward pass; what the model doesn't take is left out.
        """
        import torch

        model: Any = self.model
        taken = {name: each for name, each in arguments.items() if self._accepts(name)}
        with self.running(names, len(ids[0])):
            tokens = torch.tensor(ids, device=self.device)
            return model(input_ids=tokens, **taken, **self._last)

    def hidden_states(self, ids: Sequence[int], **arguments: Any) -> torch.Tensor:
        """Return a text's last hidden states (tokens, hidden size); arguments as `outputs`."""
        import torch

        decoder: Any = under_adapters(self.model).base_model
        taken = {name: each for name, each in arguments.items() if self._accepts(name)}
        with self.running([None], len(ids)):
            tokens = torch.tensor([list(ids)], device=self.device)
            found: torch.Tensor = decoder(input_ids=tokens, **taken).last_hidden_state[0]
        return found

    def all_logits(self, ids: Sequence[int], name: str | None, **arguments: Any) -> torch.Tensor:
        """Return the logits after each token of a text (tokens, vocabulary).

        Args:
            ids: of the text.
            name: of its adapter.
            arguments: as `outputs`.
        """
        import torch

        model: Any = self.model
        taken = {name: each for name, each in arguments.items() if self._accepts(name)}
        with self.running([name], len(ids)):
            found: torch.Tensor = model(
                input_ids=torch.tensor([list(ids)], device=self.device), **taken
            ).logits[0]
        return found

    @contextlib.contextmanager
    def running(self, names: Sequence[str | None], columns: int) -> Iterator[None]:
        """Run passes of so many columns in here, each row with the adapter of its name."""
        import torch

        with (
            torch.inference_mode(),
            one_row(self._reads_half and len(names) * columns == 1),
            self.adapters.chosen(names, columns),
            compute_in(self.model, self.device.type, self.dtype),
        ):
            yield


@dataclass(eq=False)
class Prefill:
    """Prompts that are being computed, beside the running answers.

    Attributes:
        answers: whose prompts they are.
        todo: tokens of each that are still to be computed; equal for all but short first ones.
        cache: what has been computed.
    """

    answers: list[Answer]
    todo: list[int]
    cache: Any = field(repr=False)


class Decoder(Protocol):
    """Computes prompts and next tokens, and holds what was computed of running answers.

    Attributes:
        answers: that run, in the order of their rows.
        at_once: most prompts in one prefill; where it is 1, a prompt is computed in one piece.
    """

    answers: list[Answer]
    at_once: int

    def begin(self, answers: Sequence[Answer], kept: Sequence[Kept | None]) -> Prefill:
        """Return a prefill that goes on from what is kept of `Answer.cached` tokens."""
        ...

    def advance(self, prefill: Prefill, columns: int) -> torch.Tensor | None:
        """Compute the next columns; return the logits once all are computed."""
        ...

    def join(self, prefill: Prefill) -> None:
        """Let a prefill's answers run, in the rows after the others."""
        ...

    def step(self) -> torch.Tensor:
        """Compute each running answer's newest token and return the logits after it."""
        ...

    def kept(self, row: int) -> Kept | None:
        """Return what was computed of a running answer, if a later prompt can go on from it."""
        ...

    def leave(self, row: int) -> None:
        """Take an answer out; the last one takes its row."""
        ...

    def clear(self) -> None:
        """Take all out and hold nothing."""
        ...

    def bytes(self) -> int:
        """Return what is held, with the room to grow."""
        ...

    def held_bytes(self) -> int:
        """Return what is held of running answers whose beginnings may be kept."""
        ...


class BatchedDecoder:
    """All running answers in one pass.

    Attributes:
        steps: that go without the model's forward pass; None where it is run.
    """

    at_once = 1 << 16

    def __init__(self, served: Served, own_steps: bool = True) -> None:
        """Hold nothing yet.

        Args:
            served: the model.
            own_steps: go through the model's layers by `mst.serve.decode_step` where they are
                known, instead of its forward pass.

        Raises:
            OtherCache: the model's layers keep something else than keys and values.
        """
        self._served = served
        self.steps = served.steps if own_steps else None
        self.answers: list[Answer] = []
        self._slots = self._empty()

    def _empty(self) -> Slots:
        from mst.serve.slots import Slots

        return Slots(under_adapters(self._served.model))

    def begin(self, answers: Sequence[Answer], kept: Sequence[Kept | None]) -> Prefill:
        """Lay what is kept beside each other, so that all rows compute the same columns.

        A row may compute some of what is kept of it again, because a gap between kept and new
        tokens would move those apart that a sliding window counts.
        """
        slots = self._empty()
        columns = max(len(each.ids) - each.cached for each in answers)
        for answer, own in zip(answers, kept, strict=True):
            answer.cached = max(0, len(answer.ids) - columns)
            slots.add(own, answer.cached)
        return Prefill(list(answers), [len(each.ids) - each.cached for each in answers], slots)

    def advance(self, prefill: Prefill, columns: int) -> torch.Tensor | None:
        """Compute the next columns; return the logits once all are computed."""
        columns = min(columns, max(prefill.todo))
        own = [min(columns, each) for each in prefill.todo]
        ids = []
        for answer, todo, count in zip(prefill.answers, prefill.todo, own, strict=True):
            first = len(answer.ids) - todo
            ids.append([0] * (columns - count) + answer.ids[first : first + count])
        logits = self._pass(prefill.cache, ids, own, prefill.answers)
        prefill.todo = [todo - count for todo, count in zip(prefill.todo, own, strict=True)]
        return None if any(prefill.todo) else logits

    def join(self, prefill: Prefill) -> None:
        """Copy rows into the running block."""
        slots: Slots = prefill.cache
        for row, answer in enumerate(prefill.answers):
            self._slots.add(slots.kept(row), slots.lengths[row])
            self.answers.append(answer)

    def step(self) -> torch.Tensor:
        """Compute each running answer's newest token and return the logits after it."""
        ids = [each.ids[-1] for each in self.answers]
        if self.steps is None or self.steps.overheard:
            return self._pass(self._slots, [[each] for each in ids], [1] * len(ids), self.answers)
        self._slots.reserve(1)
        names = [each.prompt.adapter for each in self.answers]
        names += names[-1:] * (self.steps.computed(len(ids)) - len(ids))
        with self._served.running(names, 1):
            logits = self.steps.logits(ids, self._slots)
        self._slots.commit([1] * len(ids))
        return logits

    def _pass(
        self,
        slots: Slots,
        ids: Sequence[Sequence[int]],
        own: Sequence[int],
        answers: Sequence[Answer],
    ) -> torch.Tensor:
        arguments = columns_beside(slots, len(ids[0]), own, self._served.device)
        names = [each.prompt.adapter for each in answers]
        logits = self._served.logits(ids, names, **arguments)
        slots.commit(own)
        return logits

    def kept(self, row: int) -> Kept | None:
        """Return a row of the block."""
        return self._slots.kept(row)

    def leave(self, row: int) -> None:
        """Take an answer out; the last one takes its row."""
        last = self._slots.remove(row)
        self.answers[row] = self.answers[last]
        self.answers.pop()
        if not self.answers:
            self.clear()

    def clear(self) -> None:
        """Take all out and hold nothing."""
        self.answers = []
        self._slots = self._empty()

    def bytes(self) -> int:
        """Return what the running block takes, with the room to grow."""
        return self._slots.bytes()

    def held_bytes(self) -> int:
        """Return what the running answers' tokens take."""
        return self._slots.held_bytes()


def columns_beside(
    slots: Slots, columns: int, own: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """Return a forward pass's arguments for columns after those of a block, with room made there.

    Args:
        slots: the block; the columns are to be committed after the pass.
        columns: of the pass.
        own: how many of these are each row's tokens; the last ones.
        device: of the tensors.
    """
    import torch

    slots.reserve(columns)
    ends = torch.tensor(
        [length + count for length, count in zip(slots.lengths, own, strict=True)], device=device
    )
    positions = ends[:, None] - columns + torch.arange(columns, device=device)
    return {
        "attention_mask": slots.mask(columns, own, device),
        "position_ids": positions.clamp(min=0),
        "past_key_values": slots,
        "use_cache": True,
    }


class AloneDecoder:
    """Each answer in a pass of its own, with the cache that the model itself makes."""

    at_once = 1

    def __init__(self, served: Served, cached: bool = True) -> None:
        """Hold nothing yet.

        Args:
            served: the model.
            cached: the model goes on from a cache; without one all is computed at each token.
        """
        self._served, self._cached = served, cached
        self.answers: list[Answer] = []
        self._caches: list[dict[str, Any]] = []

    def begin(self, answers: Sequence[Answer], kept: Sequence[Kept | None]) -> Prefill:
        """Begin with an empty cache: what a model keeps of its own may not be cut to a prefix."""
        (answer,) = answers
        answer.cached = 0
        return Prefill([answer], [len(answer.ids)], {})

    def advance(self, prefill: Prefill, columns: int) -> torch.Tensor | None:
        """Compute the whole prompt: not every model of this kind goes on from a piece."""
        (answer,) = prefill.answers
        prefill.todo = [0]
        return self._logits(answer, answer.ids, prefill.cache)

    def _logits(self, answer: Answer, ids: Sequence[int], cache: dict[str, Any]) -> torch.Tensor:
        """Return a pass's logits, and put what the model keeps into `cache`, by its argument."""
        if not self._cached:
            ids = answer.ids
        out = self._served.outputs([ids], [answer.prompt.adapter], use_cache=self._cached, **cache)
        for name in _CACHE_NAMES if self._cached else ():
            if getattr(out, name, None) is not None:
                cache[name] = getattr(out, name)
        found: torch.Tensor = out.logits[:, -1]
        return found

    def join(self, prefill: Prefill) -> None:
        """Let the answer run."""
        self.answers += prefill.answers
        self._caches.append(prefill.cache)

    def step(self) -> torch.Tensor:
        """Compute each running answer's newest token and return the logits after it."""
        import torch

        pairs = zip(self.answers, self._caches, strict=True)
        return torch.cat([self._logits(each, each.ids[-1:], cache) for each, cache in pairs])

    def kept(self, row: int) -> Kept | None:
        """Return None."""
        return None

    def leave(self, row: int) -> None:
        """Take an answer out; the last one takes its row."""
        last, cache = self.answers.pop(), self._caches.pop()
        if row < len(self.answers):
            self.answers[row], self._caches[row] = last, cache

    def clear(self) -> None:
        """Take all out and hold nothing."""
        self.answers, self._caches = [], []

    def bytes(self) -> int:
        """Return what the caches' tensors take."""
        import torch

        layers = [
            layer
            for cache in self._caches
            for each in cache.values()
            for layer in getattr(each, "layers", ())
        ]
        parts = [part for layer in layers for part in vars(layer).values()]
        flat = [one for part in parts for one in (part if isinstance(part, list) else [part])]
        return sum(each.nbytes for each in flat if isinstance(each, torch.Tensor))

    def held_bytes(self) -> int:
        """Return 0: nothing is kept that could give way."""
        return 0
