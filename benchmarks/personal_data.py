"""Megabytes a second that `mst data scan` searches, beside `json.loads` of the same lines.

Each case is a file of realistic rows in which one row of twenty, or every row, holds personal data.
One JSON line a case; both are timed in turn in one process on one core, five times, and the medians
are told. The bar is 5 MB/s.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests import personal_values as made

from mst.seal.personal_data.scan import scan_file

REPEATS = 5
ROWS = 12_000
ENGLISH = (
    "I still haven't received my new card, it was ordered over a week ago.",
    "The transfer was declined twice on Monday; the balance says 1,204.50 and it should be more.",
    "Could you explain the fee of 2.5 % that was charged on 2024-03-18 at 14:05?",
    "Thank you for waiting. Please open the app, choose Cards, and then freeze the lost one.",
    "The patient was seen on the ward, 120/80 mmHg, 36.8 C, and sent home with 500 mg twice a day.",
)
CHINESE = (
    "您好，我想咨询一下信用卡的年费是多少，什么情况下可以减免？",
    "患者因发热三天入院，体温38.5度，血压120/80，给予对症治疗后好转，于2024年3月18日出院。",
    "请您登录手机银行，点击“我的卡片”，选择需要挂失的卡，按照提示完成操作即可。",
    "这笔转账显示失败了两次，金额是1204.50元，请帮我查询一下原因，谢谢。",
)


def write_rows(path: Path, sentences: tuple[str, ...], every: int, rng: random.Random) -> None:
    """Write rows of two turns of a few sentences; each `every`th holds one or two values."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(ROWS):
            turns = [" ".join(rng.choices(sentences, k=rng.randint(1, 4))) for _ in range(2)]
            if row % every == 0:
                for kind in rng.sample(list(made.VALUES), rng.randint(1, 2)):
                    turns[0] += " " + made.with_gaps(kind, made.VALUES[kind](rng), rng)
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), turns, strict=True)
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def measure(path: Path, case: str) -> dict[str, object]:
    """Return the medians of both ways over one file, in megabytes (10^6 bytes) of CPU time."""
    size = path.stat().st_size / 1e6
    ours, plain = [], []
    for _ in range(REPEATS):
        start = time.process_time()
        with path.open("rb") as file:
            for line in file:
                json.loads(line)
        plain.append(time.process_time() - start)
        start = time.process_time()
        found = scan_file(path)
        ours.append(time.process_time() - start)
    scan, parse = size / statistics.median(ours), size / statistics.median(plain)
    return {
        "case": case,
        "megabytes": round(size, 2),
        "rows": found.rows,
        "values": sum(each.values for each in found.found),
        "scan_megabytes_per_second": round(scan, 1),
        "json_loads_megabytes_per_second": round(parse, 1),
        "ratio": round(scan / parse, 3),
    }


def main() -> None:
    """Print the machine, then a line a case; files named on the command line are cases too."""
    head = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps({**head, "load": round(os.getloadavg()[0], 1)}), flush=True)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for language, sentences in (("English", ENGLISH), ("Chinese", CHINESE)):
            for every in (20, 1):
                path = Path(folder) / f"{language}-{every}.jsonl"
                write_rows(path, sentences, every, rng)
                density = "every row" if every == 1 else f"one row in {every}"
                print(json.dumps(measure(path, f"{language}, values in {density}")), flush=True)
    for each in sys.argv[1:]:
        print(json.dumps(measure(Path(each), Path(each).name)), flush=True)


if __name__ == "__main__":
    main()
