"""What a worker in the jail tells is written into the log, and nothing that it makes up."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mst.seal.audit import open_log
from mst.seal.audit.told import recording


def test_whatever_a_worker_writes_the_next_event_is_recorded(tmp_path: Path) -> None:
    made_up = [
        b"[1]", b"7", b'{"event": ["ui.asked"]}', b"\xff\xfe", b"[" * 50_000, b"x" * 200_000,
        b'{"event": "train.done"}', b'{"event": "ui.asked", "run": {"row": "a row"}, "do": ["x"]}',
        b'{"event": "ui.asked", "row": "a row", "count": 2}',
    ]  # fmt: skip
    with (
        open_log(tmp_path, "test"),
        recording({"ui.asked"}, texts=("do", "run")) as pipe,
        open(os.dup(pipe), "wb") as told,
    ):
        for each in made_up:
            told.write(each + b"\n")
        told.write(b'{"event": "ui.asked", "do": "stop", "run": "wards"}\n')
    lines = map(json.loads, (tmp_path / "000001.jsonl").read_text().splitlines())
    facts = [each["facts"] for each in lines if each["event"] in ("ui.asked", "train.done")]

    assert facts == [{}, {"count": 2}, {"do": "stop", "run": "wards"}]
