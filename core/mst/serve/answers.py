"""An answer that is being made, as the engine's thread keeps it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mst.serve.constraint import Constraint
from mst.serve.engine import Choice, EngineFailure, Prompt, Token


@dataclass(eq=False)
class Answer:
    """What has been told of an answer and how it goes on. Its repr shows no token.

    Attributes:
        ticket: its number; smaller ones were asked before.
        prompt: what was asked.
        told: is called with each token.
        room: longest answer that the choice and the model's context leave.
        constraint: what keeps it to a JSON schema, if anything.
        ids: the prompt's tokens and the answer's so far.
        cached: tokens of the prompt that were kept from before.
        counted: whether its prompt is in the engine's figures.
        draws: its own random numbers.
    """

    ticket: int
    prompt: Prompt
    told: Callable[[Token | EngineFailure], None] = field(repr=False)
    room: int
    constraint: Constraint | None = field(default=None, repr=False)
    ids: list[int] = field(default_factory=list, repr=False)
    cached: int = 0
    counted: bool = False
    draws: random.Random = field(default_factory=random.Random, repr=False)

    def __post_init__(self) -> None:
        """Begin with the prompt's tokens and the choice's seed."""
        self.ids = list(self.prompt.ids)
        self.draws = random.Random(self.prompt.choice.seed)

    @property
    def choice(self) -> Choice:
        """Return how its tokens are chosen."""
        return self.prompt.choice

    def finish_with(self, token: int) -> Literal["stop", "length"] | None:
        """Return why the answer ends with a token that was just added; None if it goes on."""
        ends = self.constraint is not None and self.constraint.ends_with(token)
        if ends or token in self.choice.stop_ids:
            return "stop"
        return "length" if len(self.ids) - len(self.prompt.ids) >= self.room else None
