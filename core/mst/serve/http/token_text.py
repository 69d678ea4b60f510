"""Single tokens as log-probabilities name them: text and bytes."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from mst.serve.engine import Token
from mst.serve.http.answers import TokenLogprob, TopToken

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How SentencePiece writes a byte that is no character.
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Return the bytes that the characters of byte-level tokenizers stand for.

    Source: `bytes_to_unicode` of GPT-2's encoder.py (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in printable]
    found = {chr(each): each for each in printable}
    return found | {chr(256 + number): each for number, each in enumerate(others)}


@lru_cache(maxsize=2)
def _kinds(tokenizer: Tokenizer) -> tuple[frozenset[int], bool]:
    """Return the added tokens, and whether the others' characters stand for bytes."""
    added = frozenset(tokenizer.get_added_tokens_decoder())
    return added, "ByteLevel" in str(tokenizer.decoder)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes that a token stands for, also where they are half a character."""
    piece = tokenizer.id_to_token(token)
    if piece is None:
        return b""
    byte = _BYTE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    added, byte_level = _kinds(tokenizer)
    if token in added:
        return piece.encode("utf-8", "replace")
    if byte_level:
        alphabet = _alphabet()
        if all(each in alphabet for each in piece):
            return bytes(alphabet[each] for each in piece)
    return piece.replace(_SPACE, " ").encode("utf-8", "replace")


def shown(tokenizer: Tokenizer, token: int, logprob: float) -> TopToken:
    """Return a token with its log-probability."""
    raw = token_bytes(tokenizer, token)
    return TopToken(token=raw.decode("utf-8", "replace"), logprob=finite(logprob), bytes=[*raw])


def logprob_of(tokenizer: Tokenizer, token: Token) -> TokenLogprob | None:
    """Return a token of an answer with the likeliest in its place; None where none was asked."""
    if token.logprob is None:
        return None
    own = shown(tokenizer, token.id, token.logprob)
    return TokenLogprob(
        token=own.token,
        logprob=own.logprob,
        bytes=own.bytes,
        top_logprobs=[shown(tokenizer, each, value) for each, value in token.top],
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; half a character is a replacement character."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def likeliest(tokenizer: Tokenizer, token: Token) -> dict[str, float] | None:
    """Return the likeliest tokens in a token's place, and the token itself, as the older API does.

    Of two with the same text the likelier stands for both. None for a token that has no
    log-probability.
    """
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for each, value in (*token.top, (token.id, token.logprob)):
        found.setdefault(token_text(tokenizer, each), finite(value))
    return found


def finite(value: float) -> float:
    """Return a log-probability that JSON can have."""
    # JSON has no infinity; OpenAI writes this number for what can't come.
    return max(value, -9999.0)
