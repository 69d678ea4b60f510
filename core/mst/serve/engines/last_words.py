"""What an engine has written before it ended, as far as it can hold no word of a prompt.

Until the first request is sent to an engine it knows no prompt, so what it writes can be shown.
From then on its lines are dropped as they come, but for the names of exceptions.
"""

from __future__ import annotations

import builtins
import re
import threading
from collections import deque

_LINES, _LINE_LENGTH, _SHOWN = 400, 300, 8
_TELLING = re.compile(
    r"\b(?:\w*(?:Error|Exception)\b|error:|fatal|can't be started)", re.IGNORECASE
)
# A word of a prompt may look like an exception's name, so only names that are known are shown.
_NAMES = re.compile(r"\b([A-Z][A-Za-z]*(?:Error|Exception|OutOfMemory|Killed))\b")
_KNOWN = frozenset(
    {name for name in vars(builtins) if name.endswith("Error")}
    | {"OutOfMemoryError", "AcceleratorError", "DistBackendError", "EngineDeadError"}
)


class LastWords:
    """The last lines of one life of an engine."""

    def __init__(self) -> None:
        """Nothing was written, and nothing asked."""
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._names: dict[str, None] = {}
        self._asked = False
        self._lock = threading.Lock()

    def asked(self) -> None:
        """Note that a request is about to be sent: nothing that is written from here on is kept."""
        if not self._asked:
            with self._lock:
                self._asked = True

    def add(self, raw: bytes) -> None:
        """Take a line that the engine has written."""
        text = raw.decode("utf-8", "replace")
        with self._lock:
            if self._asked:
                found = (name for name in _NAMES.findall(text) if name in _KNOWN)
                self._names.update(dict.fromkeys(found))
                return
            # No escape of a terminal's.
            line = "".join(each if each.isprintable() else " " for each in text.rstrip())
            if line.strip():
                self._lines.append(line[:_LINE_LENGTH])

    def told(self) -> str:
        """Return what may be shown, "" for nothing: lines that begin with two spaces."""
        with self._lock:
            if self._asked:
                names = ", ".join(self._names)
                return (
                    f"\n  {names} (its text is withheld, it might quote a prompt)" if names else ""
                )
            telling = [each for each in self._lines if _TELLING.search(each)]
            shown = list(dict.fromkeys([*telling[-_SHOWN:], *list(self._lines)[-2:]]))
        return "".join(f"\n  {each}" for each in shown)
