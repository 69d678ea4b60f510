"""Stand in for nvidia-smi: print what is recorded of one machine.

python fake_nvidia_smi.py FOLDER ARGUMENTS-OF-NVIDIA-SMI
"""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path


def main() -> int:
    machine, arguments = Path(sys.argv[1]), sys.argv[2:]
    # A translated or a waiting tool is of no use to its caller.
    assert os.environ["LC_ALL"] == "C"
    assert sys.stdin.read() == ""
    error = machine / "error.txt"
    if error.exists():
        code, _, text = error.read_text().partition("\n")
        if code == "hang":
            time.sleep(60)
        print(text, end="")
        return int(code)
    recorded = {("topo", "-m"): "topo.txt", ("-L",): "list.txt", ("-q", "-x"): "query.xml"}
    if tuple(arguments) in recorded:
        print((machine / recorded[tuple(arguments)]).read_text(), end="")
        return 0
    wanted = arguments[0].removeprefix("--query-gpu=").split(",")
    assert arguments == [f"--query-gpu={','.join(wanted)}", "--format=csv,noheader,nounits"]
    lines = (machine / "query.csv").read_text().splitlines()
    header, *rows = csv.reader(lines, skipinitialspace=True)
    for field in wanted:
        if field not in header:
            print(f'Field "{field}" is not a valid field to query.\n')
            return 2
    for row in rows:
        whole = len(row) == len(header)
        print(", ".join(row[header.index(field)] for field in wanted) if whole else ", ".join(row))
    return 0


sys.exit(main())
