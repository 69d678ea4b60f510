"""The menu in a real terminal of 80 columns and 24 rows, as a person sees it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pexpect

# CSI and OSC sequences, and the short ones (ECMA-48).
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[=>78()][0AB]?")
DOWN = "\x1b[B"
ENTER = "\r"
ESC = "\x1b"


class Terminal:
    """A menu that a person sees, and the keys that were pressed in it."""

    def __init__(self, place: Path, *arguments: str, lines: int = 24, **environ: str) -> None:
        """Start `mst …` in a directory."""
        self.keys = 0
        self.child: Any = pexpect.spawn(
            sys.executable,
            ["-m", "mst", *arguments],
            cwd=str(place),
            env={**environment(place), **environ},
            dimensions=(lines, 80),
            encoding="utf-8",
            timeout=240,
        )
        self.child.delaybeforesend = None
        self._seen = ""

    def sees(self, text: str) -> str:
        """Wait for a text, and return what came before it."""
        self.child.expect_exact(text)
        before = ESCAPES.sub("", str(self.child.before))
        self._seen += before + text
        return before

    def press(self, *keys: str) -> None:
        """Press keys, and count them."""
        for key in keys:
            self.keys += 1
            self.child.send(key)

    def type(self, text: str) -> None:
        """Type a line."""
        self.press(*text, ENTER)

    def ends(self) -> int | None:
        """Wait for the end, and return the exit code."""
        self.child.expect(pexpect.EOF)
        self._seen += ESCAPES.sub("", str(self.child.before))
        self.child.close()
        return self.child.exitstatus  # type: ignore[no-any-return]

    @property
    def seen(self) -> str:
        """All that was written, without what steers the terminal."""
        return self._seen


def environment(place: Path) -> Mapping[str, str]:
    """Return the environment of somebody who has nothing but a directory of their own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "MST_", "HF_", "MODELSCOPE_", "NO_COLOR"))
    }
    return {
        **kept,
        "HOME": str(place),
        "LANG": "en_US.UTF-8",
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "default",
        "XDG_CACHE_HOME": str(place / "cache"),
        "XDG_DATA_HOME": str(place / "data"),
        "XDG_STATE_HOME": str(place / "state"),
    }
