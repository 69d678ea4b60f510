"""The built-in engine: answers join and leave the running batch at every step."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from mst.serve.answers import Answer
from mst.serve.batch import Batch
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
from mst.serve.own_thread import OwnThread
from mst.serve.reading import Text, read_on
from mst.training.device_memory import trim_heap
from mst.training.faults import answers as still_computes
from mst.training.faults import free_memory, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from mst.serve.decoders import Decoder, Prefill, Served

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
        together_bytes: most that is kept while answers run, what they hold included; None for no
            such limit.
    """

    batch: int = 32
    queue: int = 256
    prefill_tokens: int = 256
    prefix_bytes: int = 1 << 30
    together_bytes: int | None = None


@dataclass
class _Work:
    """What other threads leave for the engine's, under its lock."""

    waiting: deque[Answer] = field(default_factory=deque)
    cancelled: set[int] = field(default_factory=set)
    texts: deque[Text] = field(default_factory=deque)
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
        thread: OwnThread | None = None,
    ) -> None:
        """Start the engine's work.

        Args:
            served: the model, which belongs to the engine's thread from here on.
            decoder: how answers are computed, from `mst.serve.asking.way_of`.
            context: most tokens of a prompt and its answer together.
            limits: what it may take.
            constrainer: of the model's tokenizer; without one JSON schemas are refused.
            thread: in which the model was loaded; default a new one.
        """
        self.context = context
        self.adapters = tuple(each for each in served.adapters.names if each is not None)
        self._served, self._constrainer = served, constrainer
        self._queue_limit = limits.queue
        self._batch = Batch(
            decoder, limits.batch, limits.prefill_tokens, limits.prefix_bytes, limits.together_bytes
        )
        # Where prompts are computed in one piece, so are other texts.
        self._text_piece = limits.prefill_tokens if decoder.at_once > 1 else None
        self._figures: Counter[str] = Counter(batch_limit=limits.batch)
        self._work = _Work()
        self._changed = threading.Condition()
        self._thread = thread or OwnThread()
        self._thread.start(self._run)

    def submit(self, prompt: Prompt, told: Callable[[Token | EngineFailure], None]) -> int:
        """Queue a prompt and return its ticket, as `Engine.submit`."""
        length = len(prompt.ids)
        if not length:
            raise ValueError("a prompt has at least one token")
        if length >= self.context:
            raise PromptTooLong(length, self.context - 1)
        self._check_adapter(prompt.adapter)
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
            if len(work.waiting) >= self._queue_limit:
                raise Overloaded(
                    f"{len(work.waiting)} prompts are waiting already. Ask again in a moment."
                )
            ticket = work.next_ticket
            work.next_ticket += 1
            work.waiting.append(Answer(ticket, prompt, told, room, constraint))
            self._changed.notify()
        return ticket

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UnknownAdapter(
                f"there is no adapter {name[:80]!r} here (found: {known})."
                " Name one of these, or none."
            )

    def cancel(self, ticket: int) -> None:
        """Stop an answer within one step, as `Engine.cancel`."""
        with self._changed:
            if 0 < ticket < self._work.next_ticket:
                self._work.cancelled.add(ticket)
                self._changed.notify()

    def embed(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the mean hidden state of each text, as `Engine.embed`."""
        return [each.vector.result() for each in self._read([Text(list(each)) for each in ids])]

    def score(
        self, ids: Sequence[Sequence[int]], top: int, adapter: str | None = None
    ) -> list[list[Token]]:
        """Return the log-probabilities of each text's tokens, as `Scoring.score`."""
        self._check_adapter(adapter)
        texts = [Text(list(each), top, adapter) for each in ids]
        return [each.tokens.result() for each in self._read(texts)]

    def _read(self, texts: list[Text]) -> list[Text]:
        """Have texts read, one after the other."""
        for each in texts:
            if not each.ids:
                raise ValueError("a text has at least one token")
            if len(each.ids) > self.context:
                raise PromptTooLong(len(each.ids), self.context)
        with self._changed:
            if self._work.closing:
                raise Overloaded("the engine is closed. Start it again.")
            self._work.texts += texts
            self._changed.notify()
        return texts

    def figures(self) -> EngineFigures:
        """Return what the engine has done and holds."""
        with self._changed:
            return EngineFigures(**self._figures, waiting=len(self._work.waiting))

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
            for work in (self._drop_cancelled, self._read_piece, self._prefill, self._step):
                self._guarded(work)
            self._count()
        gone = EngineFailure("the engine was closed before the answer was complete.")
        with self._changed:
            left, texts = list(self._work.waiting), list(self._work.texts)
            self._work.waiting.clear()
        self._fail([*left, *self._batch.in_hand()], gone)
        for each in texts:
            each.fail(gone)
        self._batch.forget()
        self._batch.prefixes.clear()
        self._count()

    def _wait(self) -> bool:
        """Return once there is work; False when there will be none."""
        with self._changed:
            work = self._work
            while not (work.closing or work.waiting or work.cancelled or work.texts):
                if self._batch.in_hand():
                    break
                self._changed.wait()
            return not work.closing

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do a part of a step; whatever it raises ends answers, and never the engine.

        The exception's own text is told to nobody: it might quote a prompt.
        """
        try:
            work()
        except Exception as error:
            hurt = self._batch.in_hand()
            self._batch.forget()
            self._unqueue(hurt)
            if is_out_of_memory(error):
                self._batch.prefixes.clear()
            if is_out_of_memory(error) and len(hurt) > 1:
                self._with_less(hurt)
            else:
                self._fail(hurt, self._failure(error))
            # Tensors of the failed pass hang on it.
            error.__traceback__ = None
            free_memory(self._served.device)

    def _with_less(self, hurt: Sequence[Answer]) -> None:
        """Halve the batch after memory ran out; all of it waits, to be computed again."""
        self._batch.limit = max(1, len(hurt) // 2)
        again = sorted(hurt, key=lambda each: each.ticket)
        with self._changed:
            self._figures["batch_limit"] = self._batch.limit
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

    def _tell(self, answer: Answer, what: Token | EngineFailure) -> None:
        try:
            answer.told(what)
        # The callback is another module's. An answer that nobody hears is not gone on with.
        except Exception:
            self.cancel(answer.ticket)

    def _drop_cancelled(self) -> None:
        with self._changed:
            if not self._work.cancelled:
                return
            tickets, self._work.cancelled = self._work.cancelled, set()
            kept = [each for each in self._work.waiting if each.ticket not in tickets]
            dropped = len(self._work.waiting) - len(kept)
            if dropped:
                self._work.waiting = deque(kept)
        self._add(cancelled=dropped + self._batch.cancel(tickets))

    def _read_piece(self) -> None:
        """Read a piece of the first text: the running answers go on between two."""
        with self._changed:
            if not self._work.texts:
                return
            text = self._work.texts[0]
        try:
            ended = read_on(self._served, text, self._text_piece)
        # Whatever a device or a model raises: the asker is told, and the engine goes on.
        except Exception as error:
            text.fail(self._failure(error))
            ended = True
        if ended:
            with self._changed:
                self._work.texts.popleft()

    def _prefill(self) -> None:
        """Compute prompts for at most the limit of tokens, and let those run that are complete."""
        prefill = self._next_prefill()
        if prefill is None:
            return
        try:
            logits = self._batch.advance(prefill)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # The running answers are whole.
            self._batch.drop(prefill)
            self._fail(prefill.answers, self._failure(error))
            return
        if logits is not None:
            self._tell_next(logits, self._batch.join(prefill))
            if self._served.device.type == "cpu":
                # Glibc keeps what a pass over prompts has used: 18 MB beside SmolLM2-135M.
                trim_heap()

    def _next_prefill(self) -> Prefill | None:
        """Return the next prompts to compute; those that are begun leave the queue."""
        with self._changed:
            waiting = list(islice(self._work.waiting, _LOOKED_AT))
        if not waiting and not self._batch.prefilling:
            return None
        prefill = self._batch.next_prefill(waiting)
        begun = self._unqueue(self._batch.in_hand())
        new = [each for each in begun if not each.counted]
        for each in new:
            each.counted = True
        self._add(
            prompt_tokens=sum(len(each.prompt.ids) for each in new),
            cached_tokens=sum(each.cached for each in new),
        )
        return prefill

    def _unqueue(self, answers: Sequence[Answer]) -> list[Answer]:
        """Take answers out of the queue; return those that were in it."""
        with self._changed:
            found = [each for each in answers if each in self._work.waiting]
            for each in found:
                self._work.waiting.remove(each)
        return found

    def _step(self) -> None:
        """Give each running answer its next token."""
        if self._batch.running:
            logits = self._batch.step()
            self._add(steps=1)
            self._tell_next(logits, 0)

    def _tell_next(self, logits: torch.Tensor, first: int) -> None:
        """Choose and tell the next tokens of the running answers from a row on."""
        answers = self._batch.running[first:]
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
        self._batch.leave([first + row for row, over in enumerate(ended) if over])
        self._add(
            generated_tokens=len(tokens),
            finished=sum(each.finish is not None for each in tokens),
            failed=len(news) - len(tokens),
        )
        self._count()
        for answer, each in zip(answers, news, strict=True):
            self._tell(answer, each)

    def _add(self, **counts: int) -> None:
        with self._changed:
            self._figures.update(counts)

    def _count(self) -> None:
        with self._changed:
            self._figures["running"] = len(self._batch.in_hand())
            self._figures["cache_bytes"] = self._batch.bytes()
            self._figures["prefix_bytes"] = self._batch.prefixes.bytes
