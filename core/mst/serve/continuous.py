"""The built-in engine: answers join and leave the running batch at every step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from mst.serve.answers import Answer
from mst.serve.choosing import choose
from mst.serve.constraint import Constrainer
from mst.serve.engine import (
    EngineFailure,
    EngineFigures,
    Overloaded,
    Prompt,
    PromptTooLong,
    SchemaRefused,
    Token,
    UnknownAdapter,
)
from mst.serve.prefix_cache import PrefixCache
from mst.training.faults import answers as still_computes
from mst.training.faults import free_memory, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from mst.serve.decoders import Decoder, Prefill, Served
    from mst.serve.slots import Kept

# Prompts at the head of the queue that are looked at in each step.
_LOOKED_AT = 64


@dataclass(frozen=True)
class Limits:
    """What an engine may take.

    Attributes:
        batch: most answers at once.
        queue: most prompts that wait.
        prefill_tokens: most tokens of prompts computed between two steps of the running answers:
            more begin answers sooner, fewer keep the others flowing.
        prefix_bytes: most that is kept of finished answers for prompts that go on from them.
    """

    batch: int = 32
    queue: int = 256
    prefill_tokens: int = 256
    prefix_bytes: int = 1 << 30


@dataclass
class _Work:
    """What other threads leave for the engine's, under its lock."""

    waiting: deque[Answer] = field(default_factory=deque)
    cancelled: set[int] = field(default_factory=set)
    texts: deque[tuple[list[int], Future[list[float]]]] = field(default_factory=deque)
    closing: bool = False
    next_ticket: int = 1


class ContinuousEngine:
    """An engine (`mst.serve.engine.Engine`) over any decoder of transformers.

    Between two steps of the running answers at most `Limits.prefill_tokens` of new prompts are
    computed: several short ones in one pass, or a piece of a long one.
    """

    def __init__(
        self,
        served: Served,
        decoder: Decoder,
        context: int,
        limits: Limits,
        constrainer: Constrainer | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            served: the model, which belongs to that thread from here on.
            decoder: how answers are computed, from `mst.serve.asking.decoder_of`.
            context: most tokens of a prompt and its answer together.
            limits: what it may take.
            constrainer: of the model's tokenizer; without one JSON schemas are refused.
        """
        self.context = context
        self.adapters = tuple(each for each in served.adapters.names if each is not None)
        self._served, self._decoder = served, decoder
        self._limits, self._constrainer = limits, constrainer
        self._batch_limit = limits.batch
        self._prefixes = PrefixCache(limits.prefix_bytes)
        # The long prompt that is computed piece by piece, and the short ones of this step.
        self._long: Prefill | None = None
        self._group: Prefill | None = None
        self._short_turn = False
        self._figures = EngineFigures(batch_limit=limits.batch)
        self._work = _Work()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mst-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, told: Callable[[Token | EngineFailure], None]) -> int:
        """Queue a prompt and return its ticket, as `Engine.submit`."""
        length = len(prompt.ids)
        if not length:
            raise ValueError("a prompt has at least one token")
        if length >= self.context:
            raise PromptTooLong(length, self.context - 1)
        if prompt.adapter is not None and prompt.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UnknownAdapter(
                f"there is no adapter {prompt.adapter[:80]!r} here (found: {known})."
                " Name one of these, or none."
            )
        room = min(prompt.choice.max_new_tokens, self.context - length)
        constraint = None
        if prompt.choice.json_schema is not None:
            if self._constrainer is None:
                raise SchemaRefused(
                    "this engine has no tokenizer, so that it can't follow schemas."
                )
            constraint = self._constrainer.constraint(prompt.choice.json_schema)
        with self._changed:
            work = self._work
            if work.closing:
                raise Overloaded("the engine is closed. Start it again.")
            if len(work.waiting) >= self._limits.queue:
                raise Overloaded(
                    f"{len(work.waiting)} prompts are waiting already. Ask again in a moment."
                )
            ticket = work.next_ticket
            work.next_ticket += 1
            work.waiting.append(Answer(ticket, prompt, told, room, constraint))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: int) -> None:
        """Stop an answer within one step, as `Engine.cancel`."""
        with self._changed:
            if 0 < ticket < self._work.next_ticket:
                self._work.cancelled.add(ticket)
                self._changed.notify()

    def embed(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the mean hidden state of each text, as `Engine.embed`."""
        for each in ids:
            if not each:
                raise ValueError("a text has at least one token")
            if len(each) > self.context:
                raise PromptTooLong(len(each), self.context)
        asked: list[Future[list[float]]] = [Future() for _ in ids]
        with self._changed:
            if self._work.closing:
                raise Overloaded("the engine is closed. Start it again.")
            self._work.texts += zip([list(each) for each in ids], asked, strict=True)
            self._changed.notify()
        return [each.result() for each in asked]

    def figures(self) -> EngineFigures:
        """Return what the engine has done and holds."""
        with self._changed:
            return replace(self._figures, waiting=len(self._work.waiting))

    def close(self) -> None:
        """End what is running with a failure, and the engine's thread."""
        with self._changed:
            self._work.closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            self._serve()

    def _serve(self) -> None:
        while self._wait():
            for work in (self._drop_cancelled, self._embed_one, self._prefill, self._step):
                self._guarded(work)
            self._count()
        gone = EngineFailure("the engine was closed before the answer was complete.")
        with self._changed:
            left, texts = list(self._work.waiting), list(self._work.texts)
            self._work.waiting.clear()
        self._fail([*left, *self._in_hand()], gone)
        for _, future in texts:
            future.set_exception(gone)
        self._forget()
        self._prefixes.clear()
        self._count()

    def _wait(self) -> bool:
        """Return once there is work; False when there will be none."""
        with self._changed:
            work = self._work
            while not (work.closing or work.waiting or work.cancelled or work.texts):
                if self._in_hand():
                    break
                self._changed.wait()
            return not work.closing

    def _in_hand(self) -> list[Answer]:
        """Return the answers that are being computed."""
        begun = [each for each in (self._long, self._group) if each is not None]
        answers = [*self._decoder.answers, *(one for each in begun for one in each.answers)]
        # What fails while a group joins the others is in both.
        return list(dict.fromkeys(answers))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do a part of a step; whatever it raises ends answers, and never the engine.

        The exception's own text is told to nobody: it might quote a prompt.
        """
        try:
            work()
        except Exception as error:
            hurt = self._in_hand()
            self._forget()
            if is_out_of_memory(error) and len(hurt) > 1:
                self._with_less(hurt)
            else:
                self._fail(hurt, self._failure(error))
            # Tensors of the failed pass hang on it.
            error.__traceback__ = None
            free_memory(self._served.device)

    def _with_less(self, hurt: Sequence[Answer]) -> None:
        """Halve the batch after memory ran out; all of it waits, to be computed again."""
        self._prefixes.clear()
        self._batch_limit = max(1, len(hurt) // 2)
        again = sorted(hurt, key=lambda each: each.ticket)
        with self._changed:
            self._figures = replace(self._figures, batch_limit=self._batch_limit)
            self._work.waiting.extendleft(reversed(again))

    def _failure(self, error: BaseException) -> EngineFailure:
        device = self._served.device
        if isinstance(error, EngineFailure):
            return error
        if is_out_of_memory(error):
            return EngineFailure(
                f"{device} ran out of memory for this answer alone. Ask for a shorter one, or let"
                " the engine keep less for later prompts."
            )
        if device.type != "cpu" and not still_computes(device):
            return EngineFailure(f"{device} stopped answering. `mst doctor` shows what it reports.")
        return EngineFailure(
            f"the engine failed while it computed this answer ({type(error).__name__})."
            " Ask again; if it comes back, report it with the model's name."
        )

    def _fail(self, hurt: Sequence[Answer], failure: EngineFailure) -> None:
        self._add(failed=len(hurt))
        for each in hurt:
            self._tell(each, failure)

    def _forget(self) -> None:
        """Hold nothing of what was being computed."""
        self._decoder.clear()
        self._long = self._group = None

    def _tell(self, answer: Answer, what: Token | EngineFailure) -> None:
        try:
            answer.told(what)
        # The callback is another module's. An answer that nobody hears is not gone on with.
        except Exception:
            self.cancel(answer.ticket)

    def _drop_cancelled(self) -> None:
        with self._changed:
            tickets, self._work.cancelled = self._work.cancelled, set()
            kept = [each for each in self._work.waiting if each.ticket not in tickets]
            dropped = len(self._work.waiting) - len(kept)
            if dropped:
                self._work.waiting = deque(kept)
        running = self._decoder.answers
        rows = [row for row, each in enumerate(running) if each.ticket in tickets]
        if self._long is not None and self._long.answers[0].ticket in tickets:
            self._long = None
            dropped += 1
        self._add(cancelled=dropped + len(rows))
        self._leave(rows)

    def _embed_one(self) -> None:
        """Compute one text: the running answers go on between two."""
        with self._changed:
            if not self._work.texts:
                return
            ids, future = self._work.texts.popleft()
        try:
            states = self._served.hidden_states(ids)
            future.set_result(states.float().mean(0).tolist())
        # Whatever a device or a model raises: the asker is told, and the engine goes on.
        except Exception as error:
            future.set_exception(self._failure(error))

    def _prefill(self) -> None:
        """Compute prompts for at most the limit of tokens, and let those run that are complete."""
        prefill = self._next_prefill()
        if prefill is None:
            return
        try:
            logits = self._decoder.advance(prefill, self._limits.prefill_tokens)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # The running answers are whole.
            self._drop(prefill)
            self._fail(prefill.answers, self._failure(error))
            return
        if logits is not None:
            first = len(self._decoder.answers)
            self._decoder.join(prefill)
            self._drop(prefill)
            self._tell_next(logits, first)

    def _drop(self, prefill: Prefill) -> None:
        if prefill is self._long:
            self._long = None
        if prefill is self._group:
            self._group = None

    def _next_prefill(self) -> Prefill | None:
        """Return short prompts that fit one pass, or the long one; in turns if there are both."""
        if self._long is None or self._short_turn:
            self._short_turn = False
            taken = self._taken()
            if taken:
                answers, kept = [each for each, _ in taken], [own for _, own in taken]
                self._group = self._begun(answers, kept)
                return self._group
        self._short_turn = self._long is not None
        return self._long

    def _taken(self) -> list[tuple[Answer, Kept | None]]:
        """Take short prompts that fit one pass from the queue, in order, with what is kept of them.

        The first long one that is met becomes the one that is computed piece by piece.
        """
        decoder, limit = self._decoder, self._limits.prefill_tokens
        free = self._batch_limit - len(decoder.answers) - (self._long is not None)
        with self._changed:
            waiting = list(islice(self._work.waiting, _LOOKED_AT))
        taken: list[tuple[Answer, Kept | None]] = []
        columns = 0
        for answer in waiting:
            if len(taken) >= min(free, decoder.at_once):
                break
            kept, answer.cached = self._prefixes.find(answer.prompt, answer.ids)
            new = len(answer.ids) - answer.cached
            if new > limit and decoder.at_once > 1:
                if self._long is None:
                    self._unqueue([answer])
                    self._long = self._begun([answer], [kept])
                    free -= 1
                continue
            columns = max(columns, new)
            if taken and columns * (len(taken) + 1) > limit:
                break
            taken.append((answer, kept))
        self._unqueue([each for each, _ in taken])
        return taken

    def _unqueue(self, answers: Sequence[Answer]) -> None:
        with self._changed:
            for each in answers:
                self._work.waiting.remove(each)

    def _begun(self, answers: list[Answer], kept: list[Kept | None]) -> Prefill:
        prefill = self._decoder.begin(answers, kept)
        new = [each for each in answers if not each.counted]
        for each in new:
            each.counted = True
        self._add(
            prompt_tokens=sum(len(each.prompt.ids) for each in new),
            cached_tokens=sum(each.cached for each in new),
        )
        return prefill

    def _step(self) -> None:
        """Give each running answer its next token."""
        if self._decoder.answers:
            logits = self._decoder.step()
            self._add(steps=1)
            self._tell_next(logits, 0)

    def _tell_next(self, logits: torch.Tensor, first: int) -> None:
        """Choose and tell the next tokens of the running answers from a row on."""
        answers = self._decoder.answers[first:]
        news: list[Token | EngineFailure] = []
        for answer, what in zip(answers, choose(logits, answers), strict=True):
            if isinstance(what, EngineFailure):
                news.append(what)
                continue
            answer.ids.append(what.id)
            finish = answer.finish_with(what.id)
            news.append(Token(what.id, what.logprob, what.top, finish, answer.cached))
        tokens = [each for each in news if isinstance(each, Token)]
        ended = [isinstance(each, EngineFailure) or each.finish is not None for each in news]
        # Taken out first: who hears the last token finds an engine that is done with it.
        self._leave([first + row for row, over in enumerate(ended) if over])
        self._add(
            generated_tokens=len(tokens),
            finished=sum(each.finish is not None for each in tokens),
            failed=len(news) - len(tokens),
        )
        self._count()
        for answer, each in zip(answers, news, strict=True):
            self._tell(answer, each)

    def _leave(self, rows: Sequence[int]) -> None:
        """Take answers out, and keep what was computed of them for prompts that go on from it."""
        # From the last on: the row of one that leaves is taken by the last.
        for row in sorted(rows, reverse=True):
            answer, kept = self._decoder.answers[row], self._decoder.kept(row)
            if kept:
                try:
                    length = next(iter(kept.values()))[0].shape[1]
                    self._prefixes.keep(answer.prompt, answer.ids[:length], kept)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self._prefixes.clear()
            self._decoder.leave(row)

    def _add(self, **counts: int) -> None:
        with self._changed:
            now = {name: getattr(self._figures, name) + count for name, count in counts.items()}
            self._figures = replace(self._figures, **now)

    def _count(self) -> None:
        with self._changed:
            self._figures = replace(
                self._figures,
                running=len(self._in_hand()),
                cache_bytes=self._decoder.bytes(),
                prefix_bytes=self._prefixes.bytes,
            )
