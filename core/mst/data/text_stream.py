"""Token ids to text while they come: as soon as whole characters are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How tokenizers begins the error that tells of text which it would have to take back.
_TAKEN_BACK = "Invalid prefix"


class TextStream:
    """The text of an answer's tokens; special tokens have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Nothing has come yet."""
        from tokenizers.decoders import DecodeStream

        self._make, self._tokenizer = DecodeStream, tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._last: int | None = None

    def push(self, token: int) -> str:
        """Return what a token adds to the text: nothing while its character is not whole."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception as error:
            if not str(error).startswith(_TAKEN_BACK):
                raise
            text = self._anew(token)
        if text:
            self._last = token
        return text or ""

    def _anew(self, token: int) -> str | None:
        """Go on from the last token that has shown something.

        Bytes that SentencePiece's tokenizers write one by one become replacement characters all
        together when one of them is no character, those that were shown whole too.
        """
        self._stream = self._make(skip_special_tokens=True)
        if self._last is not None:
            self._stream.step(self._tokenizer, self._last)
        return self._stream.step(self._tokenizer, token)
