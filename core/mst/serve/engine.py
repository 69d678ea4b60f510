"""What an engine is asked, what it tells and how it fails: where both sides of `mst serve` meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from mst.errors import MstError


class Overloaded(MstError):
    """The engine's queue is full: ask again later."""


class PromptTooLong(MstError):
    """A prompt leaves no room for an answer in the model's context.

    Attributes:
        tokens: of the prompt.
        limit: most tokens that a prompt may have.
    """

    def __init__(self, tokens: int, limit: int) -> None:
        """Say how far it is too long."""
        super().__init__(
            f"the prompt has {tokens} tokens, and this model reads {limit} at most before it"
            " answers. Send a shorter one."
        )
        self.tokens, self.limit = tokens, limit


class UnknownAdapter(MstError):
    """A prompt names an adapter that the engine was not started with."""


class SchemaRefused(MstError):
    """A JSON schema can't be used to constrain an answer; says what is wrong with it."""


class EngineFailure(MstError):
    """An answer was begun and can't be finished; says why, without a word of its prompt."""


@dataclass(frozen=True)
class Choice:
    """How the next tokens of an answer are chosen.

    Attributes:
        max_new_tokens: longest answer; the model's context may end it sooner.
        temperature: 0 takes the most likely token; larger is more varied.
        top_p: only the most likely tokens that make up this share of the probability.
        seed: of the answer's own draws, which nothing else in the batch changes.
        top_logprobs: None for no log-probabilities, 0 for the chosen token's, else that many of
            the likeliest tokens too.
        stop_ids: tokens that end the answer.
        json_schema: the answer is JSON that fits this schema; "{}" for any JSON object.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from these once for each time that the answer has them.
        logit_bias: (token, what is added to its logit); tokens that the model lacks count nothing.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()
    json_schema: str | None = field(default=None, repr=False)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Prompt:
    """What is asked of the engine. Its repr shows no token: it may stand in a traceback.

    Attributes:
        ids: token ids up to where the model answers; at least one.
        choice: how the answer is chosen.
        adapter: one of the engine's; None for the model that it was started with.
        caller: who asks. What is kept of a conversation helps the same caller only: a shorter
            wait would tell another one what was asked before.
    """

    ids: tuple[int, ...] = field(repr=False)
    choice: Choice
    adapter: str | None = None
    caller: str = ""


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        id: the token; one of `Choice.stop_ids` is told too, and is not part of the text.
        logprob: log-probability of the token, from the model's own logits in float32, before
            penalties, biases, temperature, top_p and schema; None where none was asked for.
        top: the likeliest tokens with theirs, the likeliest first.
        finish: why this is the last token; None while more will come.
        cached: tokens of the prompt that were not computed, because they were kept from before.
    """

    id: int = field(repr=False)
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    finish: Literal["stop", "length"] | None = None
    cached: int = 0


@dataclass(frozen=True)
class EngineFigures:
    """What an engine has done and holds, for its metrics.

    Attributes:
        running: answers that get a token at each step.
        waiting: prompts that were accepted and are not computed yet.
        batch_limit: most answers at once; less than at the start once memory ran out.
        steps: passes through the model that gave each running answer a token.
        prompt_tokens: of accepted prompts whose computing has begun.
        cached_tokens: of these, kept from before.
        generated_tokens: told so far.
        finished: answers that ended by themselves.
        cancelled: answers that were stopped.
        failed: answers that ended in an `EngineFailure`.
        cache_bytes: keys and values of running answers, with the room to grow.
        prefix_bytes: keys and values kept for later prompts.
        restarts: of an engine in a process of its own, after it had ended by itself.
    """

    running: int = 0
    waiting: int = 0
    batch_limit: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    cache_bytes: int = 0
    prefix_bytes: int = 0
    restarts: int = 0


class Engine(Protocol):
    """Answers prompts, many at once. Every method may be called from any thread.

    Attributes:
        context: most tokens of a prompt and its answer together.
    """

    context: int

    @property
    def adapters(self) -> Sequence[str]:
        """The names that `Prompt.adapter` may be."""
        ...

    def submit(self, prompt: Prompt, told: Callable[[Token | EngineFailure], None]) -> int:
        """Queue a prompt and return its ticket.

        Args:
            prompt: what is asked.
            told: is called from the engine's thread with each token, the last of which has a
                `finish`, or with a failure, after which nothing comes. It must return at once.

        Raises:
            Overloaded: the queue is full, or the engine is closed.
            PromptTooLong: it leaves no room for an answer.
            UnknownAdapter: the engine has no such adapter.
            SchemaRefused: the JSON schema can't be used.
        """
        ...

    def cancel(self, ticket: int) -> None:
        """Stop an answer within one step; nothing is told of it then. Unknown tickets are fine."""
        ...

    def embed(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the mean of the last hidden states over each text's tokens.

        Raises:
            PromptTooLong: one is longer than the context.
            EngineFailure: it can't be computed.
        """
        ...

    def figures(self) -> EngineFigures:
        """Return what the engine has done and holds."""
        ...

    def close(self) -> None:
        """End what is running with a failure, and the engine's thread."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """An engine that also tells how likely texts are; not every one can."""

    def score(
        self, ids: Sequence[Sequence[int]], top: int, adapter: str | None = None
    ) -> list[list[Token]]:
        """Return each text's tokens with their log-probabilities after those before them.

        The first token of a text has none, for nothing is before it.

        Args:
            ids: tokens of each text.
            top: how many of the likeliest tokens are told in each token's place.
            adapter: one of the engine's; None for the model that it was started with.

        Raises:
            Overloaded: the engine is closed.
            PromptTooLong: one is longer than the context.
            UnknownAdapter: the engine has no such adapter.
            EngineFailure: it can't be computed.
        """
        ...
