"""From token ids to text that may be shown: whole characters, up to a stop text and no further."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mst.data.text_stream import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens that some tokenizers hold for special, and that say where a tool call stands.
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"


class Decoder:
    """Token ids to text, as soon as whole characters are known."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decode with this tokenizer; special tokens are left out, marks of tool calls kept."""
        self._stream = TextStream(tokenizer)
        marks = {tokenizer.token_to_id(text): text for text in (CALL_BEGIN, CALL_END)}
        added = tokenizer.get_added_tokens_decoder()
        self._marks = {
            number: text
            for number, text in marks.items()
            if number is not None and number in added and added[number].special
        }

    def push(self, token: int) -> str:
        """Return what a token adds to the text."""
        if token in self._marks:
            return self._marks[token]
        return self._stream.push(token)


class Held:
    """Text that is shown as it comes, except for what may be the beginning of a mark."""

    def __init__(self, marks: Sequence[str]) -> None:
        """Look for any of `marks`."""
        self._marks = [each for each in marks if each]
        self._waiting = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return what may be shown; when a mark has come, `found` is that, and nothing more is.

        Args:
            text: what has come.
        """
        if self.found is not None:
            return ""
        whole = self._waiting + text
        places = [(whole.find(each), each) for each in self._marks]
        # The one that is whole first, however the text is cut; of two, the longer.
        ends = [(at + len(each), at, each) for at, each in places if at >= 0]
        if ends:
            end, at, self.found = min(ends)
            self._waiting = whole[end:]
            return whole[:at]
        kept = max((_overlap(whole, each) for each in self._marks), default=0)
        self._waiting = whole[len(whole) - kept :]
        return whole[: len(whole) - kept]

    def rest(self) -> str:
        """Return what was held back, or stands behind the mark that was found."""
        waiting, self._waiting = self._waiting, ""
        return waiting


def _overlap(text: str, mark: str) -> int:
    """Return how long the longest beginning of `mark` is with which `text` ends."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
