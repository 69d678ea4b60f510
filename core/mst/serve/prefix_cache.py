"""Keys and values of conversations that may go on, so that only their new tokens are computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mst.serve.engine import Prompt

if TYPE_CHECKING:
    from mst.serve.slots import Kept

_Owner = tuple[str, str | None]


class PrefixCache:
    """Kept keys and values, within a budget; what was used longest ago goes first.

    They belong to a caller and an adapter. To share them between callers would let one find out, by
    how soon its answer begins, what another has asked.
    """

    def __init__(self, budget_bytes: int, together_bytes: int | None = None) -> None:
        """Keep nothing yet.

        Args:
            budget_bytes: most that is kept; 0 keeps nothing.
            together_bytes: most that is kept and in use together: what is kept gives way to what
                runs. None where it doesn't.
        """
        self._budget = self._limit = budget_bytes
        self._together = together_bytes
        self._entries: OrderedDict[tuple[_Owner, tuple[int, ...]], Kept] = OrderedDict()
        self.bytes = 0

    def find(self, prompt: Prompt, ids: Sequence[int]) -> tuple[Kept | None, int]:
        """Return what is kept of a beginning of `ids`, and how many tokens that is.

        At least one token is left to compute: its logits are not kept.
        """
        owner = (prompt.caller, prompt.adapter)
        best, most = None, 0
        for key in self._entries:
            # A longer beginning has at least one more token in common.
            longer = len(key[1]) > most < len(ids) and key[1][most] == ids[most]
            if key[0] == owner and longer and (common := _common(key[1], ids)) > most:
                best, most = key, common
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best], min(most, len(ids) - 1)

    def keep(self, prompt: Prompt, ids: Sequence[int], kept: Kept) -> None:
        """Keep a copy of what was computed of a conversation.

        Args:
            prompt: that began it.
            ids: its tokens, as many as `kept` has.
            kept: keys and values; views are fine.
        """
        owner, tokens = (prompt.caller, prompt.adapter), tuple(ids)
        size = sum(part.nbytes for pair in kept.values() for part in pair)
        if size > self._limit or not tokens:
            return
        for key in [each for each in self._entries if each[0] == owner]:
            common = _common(key[1], tokens)
            if common == len(tokens):
                self._entries.move_to_end(key)
                return
            if common == len(key[1]):
                self._drop(key)
        self._drop_beyond(self._limit - size)
        self._entries[owner, tokens] = _own(kept)
        self.bytes += size

    def give_way(self, running_bytes: int) -> None:
        """Keep no more than what running answers, who hold so much, leave of the room for both."""
        if self._together is not None:
            self._limit = min(self._budget, max(0, self._together - running_bytes))
            self._drop_beyond(self._limit)

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self.bytes = 0

    def _drop_beyond(self, limit: int) -> None:
        while self.bytes > limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[_Owner, tuple[int, ...]]) -> None:
        self.bytes -= sum(part.nbytes for pair in self._entries.pop(key).values() for part in pair)


def _own(kept: Kept) -> Kept:
    """Return a copy that does not hold on to the block that a view lies in."""
    from mst.serve.pages import copies

    parts = iter(copies([part for pair in kept.values() for part in pair]))
    return {place: (next(parts), next(parts)) for place in kept}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common from their beginnings."""
    shorter = min(len(one), len(other))
    if tuple(one[:shorter]) == tuple(other[:shorter]):
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])
