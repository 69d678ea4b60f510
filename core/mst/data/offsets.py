"""From characters that carry loss to tokens that do."""

from __future__ import annotations

from collections.abc import Sequence

from mst.data.spans import Span


def labelled(
    offsets: Sequence[tuple[int, int]], spans: Sequence[Span | tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return (position, place of its span) of the tokens whose characters overlap a span.

    Args:
        offsets: (start, end) in characters of each token, ascending. Tokens of one multi-byte
            character all have that character's offsets.
        spans: ascending (start, end) in characters.
    """
    positions = []
    place = covered = 0
    for position, (start, end) in enumerate(offsets):
        if start == end:
            # Tokenizers that trim offsets give white space no width: it stands between the
            # former token and here. What has no room even so is a character of its own.
            start, end = (covered, end) if covered < end else (start, end + 1)
        else:
            covered = end
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        if place == len(spans):
            break
        if end > spans[place][0]:
            positions.append((position, place))
    return positions
