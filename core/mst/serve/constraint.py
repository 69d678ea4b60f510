"""Answers that fit a JSON schema: which tokens may come next, by llguidance.

llguidance turns a schema into a grammar over the tokenizer's own tokens and says which may follow.
What it does not know of JSON schema it refuses, instead of leaving it out in silence.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mst.errors import ModelError
from mst.serve.engine import EngineFailure, SchemaRefused
from mst.serve.packages import INSTALL

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

_ANY_OBJECT = {"type": "object"}
# Between JSON's marks. Where any white space may stand, a small model writes nothing else until its
# answer is cut.
_WHITESPACE = "[ ]?"


class Constraint:
    """Where one answer stands in its schema."""

    def __init__(self, matcher: Any, stop: Sequence[int]) -> None:
        """Begin at the schema's start; `stop` are the tokens that may end the answer."""
        self._matcher, self._stop = matcher, frozenset(stop)

    def allowed(self, vocab_size: int) -> numpy.ndarray[Any, Any]:
        """Return whether each token may come next (vocab_size,).

        Raises:
            EngineFailure: the schema is more than the library can follow.
        """
        import llguidance.numpy
        import numpy

        bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, bits, 0)
        self._check()
        whole = numpy.unpackbits(bits.view(numpy.uint8), bitorder="little")[:vocab_size]
        return whole.astype(bool)

    def take(self, token: int) -> None:
        """Go on by a token that was chosen.

        Raises:
            EngineFailure: it was none of those that were allowed.
        """
        if not self.ends_with(token):
            self._matcher.consume_token(token)
            self._check()

    def ends_with(self, token: int) -> bool:
        """Return whether a token ends the answer."""
        return token in self._stop

    def _check(self) -> None:
        # The library's own words may quote the answer.
        if self._matcher.is_error():
            raise EngineFailure(
                "the answer could not be kept to its JSON schema any further. Simplify the schema."
            )


class Constrainer:
    """Makes constraints for one tokenizer; from any thread."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        """Keep what is needed; the library is loaded when the first schema comes.

        Args:
            tokenizer: of the model.
            eos_token_ids: tokens that end an answer.
            vocab_size: of the model's logits.
        """
        self._tokenizer, self._eos = tokenizer, list(eos_token_ids)
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def constraint(self, schema: str) -> Constraint:
        """Return what keeps an answer to a JSON schema, as JSON text; "{}" for any object.

        Raises:
            SchemaRefused: it is no JSON, no schema, or asks for what llguidance lacks.
            ModelError: llguidance is not installed.
        """
        from_text = _parsed(schema)
        vocabulary = self._loaded()
        import llguidance

        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            from_text or _ANY_OBJECT, overrides={"whitespace_pattern": _WHITESPACE}
        )
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            lines = str(matcher.get_error()).splitlines() or ["no reason given"]
            raise SchemaRefused(
                f"this JSON schema can't constrain an answer: {lines[0][:300]}."
                " Leave out what is not supported, or check the answer yourself."
            )
        return Constraint(matcher, self._eos)

    def _loaded(self) -> Any:
        try:
            import llguidance
        except ImportError:
            raise ModelError(
                f"answers that fit a JSON schema need llguidance, which is not here. Install it:"
                f" {INSTALL}"
            ) from None
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.LLTokenizer(
                    self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=self._eos
                )
        return self._vocabulary


def _parsed(schema: str) -> Any:
    try:
        found = json.loads(schema)
    except ValueError as error:
        raise SchemaRefused(f"the JSON schema is no JSON: {error}. Send a JSON object.") from None
    if not isinstance(found, dict):
        raise SchemaRefused("the JSON schema is no JSON object. Send one, or {} for any object.")
    return found
