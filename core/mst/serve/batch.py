"""Which answers are computed together, and which prompts join them: the engine's side of a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from mst.serve.answers import Answer
from mst.serve.prefix_cache import PrefixCache
from mst.training.faults import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from mst.serve.decoders import Decoder, Prefill
    from mst.serve.slots import Kept


class Batch:
    """The running answers and the prompts that are about to join them.

    Attributes:
        limit: most answers at once.
        prefixes: what is kept of those that have left.
    """

    def __init__(
        self,
        decoder: Decoder,
        limit: int,
        prefill_tokens: int,
        prefix_bytes: int,
        together_bytes: int | None = None,
    ) -> None:
        """Begin empty; the numbers are those of `mst.serve.continuous.Limits`."""
        self.limit = limit
        self.prefixes = PrefixCache(prefix_bytes, together_bytes)
        self._decoder, self._prefill_tokens = decoder, prefill_tokens
        # The long prompt that is computed piece by piece, and the short ones of this step.
        self._long: Prefill | None = None
        self._group: Prefill | None = None
        self._short_turn = False

    @property
    def running(self) -> list[Answer]:
        """Return the answers that get a token at each step, in the order of their rows."""
        return self._decoder.answers

    @property
    def prefilling(self) -> bool:
        """Whether a prompt is being computed piece by piece."""
        return self._long is not None

    def in_hand(self) -> list[Answer]:
        """Return all answers that something is computed of."""
        begun = [each for each in (self._long, self._group) if each is not None]
        answers = [*self.running, *(one for each in begun for one in each.answers)]
        # What fails while a group joins the others is in both.
        return list(dict.fromkeys(answers))

    def bytes(self) -> int:
        """Return what the running answers take."""
        return self._decoder.bytes()

    def next_prefill(self, waiting: Sequence[Answer]) -> Prefill | None:
        """Return short prompts that fit one pass, or the long one; in turns if there are both.

        Args:
            waiting: in order; those that are begun are in hand afterwards.
        """
        if self._long is None or self._short_turn:
            self._short_turn = False
            taken = self._taken(waiting)
            if taken:
                answers, kept = [each for each, _ in taken], [own for _, own in taken]
                self._group = self._decoder.begin(answers, kept)
                return self._group
        self._short_turn = self._long is not None
        return self._long

    def _taken(self, waiting: Sequence[Answer]) -> list[tuple[Answer, Kept | None]]:
        """Return the first prompts that fit one pass, with what is kept of them.

        The first long one that is met becomes the one that is computed piece by piece.
        """
        decoder, limit = self._decoder, self._prefill_tokens
        free = self.limit - len(self.running) - (self._long is not None)
        taken: list[tuple[Answer, Kept | None]] = []
        columns = 0
        for answer in waiting:
            if len(taken) >= min(free, decoder.at_once):
                break
            kept, answer.cached = self.prefixes.find(answer.prompt, answer.ids)
            new = len(answer.ids) - answer.cached
            if new > limit and decoder.at_once > 1:
                if self._long is None:
                    self._long = decoder.begin([answer], [kept])
                    free -= 1
                continue
            columns = max(columns, new)
            if taken and columns * (len(taken) + 1) > limit:
                break
            taken.append((answer, kept))
        return taken

    def advance(self, prefill: Prefill) -> torch.Tensor | None:
        """Compute the next piece of prompts; return the logits once all is computed."""
        return self._decoder.advance(prefill, self._prefill_tokens)

    def join(self, prefill: Prefill) -> int:
        """Let a prefill's answers run; return the first one's row."""
        first = len(self.running)
        self._decoder.join(prefill)
        self.drop(prefill)
        return first

    def drop(self, prefill: Prefill) -> None:
        """Have nothing more to do with a prefill."""
        if prefill is self._long:
            self._long = None
        if prefill is self._group:
            self._group = None

    def step(self) -> torch.Tensor:
        """Return the logits of each running answer's next token."""
        if self.prefixes.bytes:
            self.prefixes.give_way(self._decoder.held_bytes())
        return self._decoder.step()

    def cancel(self, tickets: Collection[int]) -> int:
        """Take answers out by their tickets; return how many there were."""
        rows = [row for row, each in enumerate(self.running) if each.ticket in tickets]
        self.leave(rows)
        if self._long is None or self._long.answers[0].ticket not in tickets:
            return len(rows)
        self._long = None
        return len(rows) + 1

    def leave(self, rows: Sequence[int]) -> None:
        """Take answers out, and keep what was computed of them for prompts that go on from it."""
        # From the last on: the row of one that leaves is taken by the last.
        for row in sorted(rows, reverse=True):
            answer, kept = self.running[row], self._decoder.kept(row)
            if kept:
                length = next(iter(kept.values()))[0].shape[1]
                own = sum(part.nbytes for pair in kept.values() for part in pair)
                self.prefixes.give_way(self._decoder.held_bytes() - own)
                try:
                    self.prefixes.keep(answer.prompt, answer.ids[:length], kept)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    self.prefixes.clear()
            self._decoder.leave(row)

    def forget(self) -> None:
        """Hold nothing of what was being computed."""
        self._decoder.clear()
        self._long = self._group = None
