"""Code that a process no longer uses takes no memory, and is there again when it is called."""

from __future__ import annotations

import subprocess
import sys

from mst.library_pages import _clean

SMAPS = """\
7f0000000000-7f0000002000 r-xp 00001000 fd:00 42                         /lib/clean.so
Rss:                   8 kB
Anonymous:             0 kB
7f0000002000-7f0000003000 r-xp 00003000 fd:00 42                         /lib/relocated.so
Anonymous:             4 kB
7f0000003000-7f0000004000 r--p 00004000 fd:00 42                         /lib/data.so
Anonymous:             0 kB
7f0000004000-7f0000005000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
"""
TORCH = """
import re, torch
from mst import library_pages

def files():
    return int(re.search(r"RssFile:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = files()
library_pages.release()
print(before - files() > 20 << 10, torch.ones(3, 3).matmul(torch.ones(3, 1)).sum().item())
"""


def test_only_code_that_is_as_its_file_has_it_is_let_go() -> None:
    assert list(_clean(SMAPS)) == [(0x7F0000000000, 0x7F0000002000)]


def test_code_that_is_let_go_runs_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["True", "9.0"]
