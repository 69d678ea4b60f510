"""A changed log is acknowledged, an old one pruned after six months, and both can be seen."""

from __future__ import annotations

import json
import os
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mst.cli import main
from mst.errors import AuditError
from mst.seal.audit.event import who
from mst.seal.audit.opening import open_directory
from mst.seal.audit.reading import events
from mst.seal.audit.upkeep import acknowledge, earliest_kept, export, prune
from mst.seal.audit.verification import read_export, verify

REASON = "the disk was replaced"


def last(directory: Path, name: str) -> dict[str, Any]:
    return [event for _, event in events(directory, event=name)][-1]


@pytest.mark.parametrize("damage", ["edit", "cut", "first file gone", "all gone", "key gone"])
def test_a_changed_log_goes_on_when_somebody_has_acknowledged_it(
    damage: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "000002.jsonl"
    if damage == "edit":
        path.write_bytes(path.read_bytes().replace(b'"number":5', b'"number":6', 1))
    elif damage == "cut":
        newest = sorted(copied.glob("*.jsonl"))[-1]
        lines = newest.read_bytes().splitlines(keepends=True)
        newest.write_bytes(b"".join(lines[:-2]))
    elif damage == "first file gone":
        (copied / "000001.jsonl").unlink()
    elif damage == "all gone":
        for each in copied.glob("*.jsonl"):
            each.unlink()
    else:
        (copied / "key").unlink()
    flag = ["--audit-log", str(copied)]

    with pytest.raises(AuditError):
        open_directory(copied, who(""))
    assert main(["audit", "acknowledge", "--reason", REASON, *flag]) == 0
    told = last(copied, "log.acknowledged")["facts"]
    assert told["reason"] == REASON
    assert told["problems"]
    assert told["new_key"] == (damage == "key gone")
    assert main(["audit", "verify", *flag]) == 0
    shown = capsys.readouterr().out
    assert ("acknowledged: 000002.jsonl" in shown.partition("goes on")[2]) == (damage == "edit")
    log = open_directory(copied, who(""))
    log.append("test.after", {})
    log.checkpoint()
    log.close()
    assert verify(copied).problems == ()


def test_what_was_acknowledged_must_stay_as_it_is(copied: Path) -> None:
    path = copied / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"number":5', b'"number":6', 1))
    acknowledge(copied, REASON, who(""))
    path.write_bytes(path.read_bytes().replace(b'"number":7', b'"number":8', 1))

    assert "000001.jsonl was changed or removed" in verify(copied).problems[-1]
    with pytest.raises(AuditError, match="was changed"):
        open_directory(copied, who(""))


def test_damage_is_acknowledged_twice(copied: Path) -> None:
    for number in (5, 7):
        path = copied / "000002.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"number":%d' % number, b'"number":99', 1))
        acknowledge(copied, REASON, who(""))

        assert verify(copied).problems == ()


def test_an_export_from_before_still_verifies_after_an_acknowledgement(
    copied: Path, tmp_path: Path
) -> None:
    export(copied, tmp_path / "kept.json", who(""))
    checkpoint, public = read_export(tmp_path / "kept.json")
    path = copied / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"number":5', b'"number":6', 1))
    acknowledge(copied, REASON, who(""))

    assert verify(copied, public, checkpoint).problems == ()


def test_nothing_is_acknowledged_where_nothing_is_wrong(copied: Path) -> None:
    with pytest.raises(AuditError, match="nothing is wrong"):
        acknowledge(copied, REASON, who(""))
    assert main(["audit", "acknowledge", "--reason", " ", "--audit-log", str(copied)]) == 2


def test_upkeep_waits_for_running_commands(copied: Path) -> None:
    path = copied / "000001.jsonl"
    running = open_directory(copied, who(""))
    path.write_bytes(path.read_bytes().replace(b'"number":5', b'"number":6', 1))

    with pytest.raises(AuditError, match="Wait until it has ended"):
        acknowledge(copied, REASON, who(""))
    running.close()


def months_of_events(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an event in each month of 2025, and one today."""
    for month in range(1, 13):
        with monkeypatch.context() as patch:
            time = f"2025-{month:02}-15T00:00:00.000000Z"
            for module in ("log", "opening"):
                patch.setattr(f"mst.seal.audit.{module}.now", partial(str, time))
            log = open_directory(directory, who(""))
            log.append("test.month", {"month": month})
            log.checkpoint()
            log.close()
    open_directory(directory, who("")).close()


def test_old_files_are_pruned_and_the_rest_verifies(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    months_of_events(directory, monkeypatch)
    removed = prune(directory, date(2025, 4, 1), who(""))

    assert [each.name for each in removed] == ["000001.jsonl", "000002.jsonl", "000003.jsonl"]
    assert verify(directory).problems == ()
    assert last(directory, "log.pruned")["facts"]["through"] == 3
    months = [event["facts"]["month"] for _, event in events(directory, event="test.month")]
    assert months == list(range(4, 13))
    open_directory(directory, who("")).close()
    export(directory, tmp_path / "kept.json", who(""))
    checkpoint, public = read_export(tmp_path / "kept.json")
    assert verify(directory, public, checkpoint).problems == ()
    assert len(prune(directory, date(2025, 6, 1), who(""))) == 2
    assert verify(directory).problems == ()
    assert prune(directory, date(2025, 6, 1), who("")) == ()


def test_files_that_were_removed_by_hand_are_missed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    months_of_events(directory, monkeypatch)
    prune(directory, date(2025, 4, 1), who(""))
    (directory / "000004.jsonl").unlink()

    assert verify(directory).problems == ("000004.jsonl is missing, and was not pruned",)


def test_nothing_younger_than_six_months_is_pruned(copied: Path) -> None:
    latest = earliest_kept(date.today())
    too_young = latest.replace(day=28) if latest.day < 28 else latest.replace(day=1)
    if too_young <= latest:
        too_young = date.today()

    with pytest.raises(AuditError, match="less than 6 months ago") as caught:
        prune(copied, too_young, who(""))
    assert caught.value.exit_code == 3
    assert prune(copied, latest, who("")) == ()


@pytest.mark.parametrize(
    ("today", "latest"),
    [("2026-11-26", "2026-05-26"), ("2026-03-31", "2025-09-30"), ("2026-08-31", "2026-02-28")],
)
def test_six_months_are_months_of_the_calendar(today: str, latest: str) -> None:
    assert earliest_kept(date.fromisoformat(today)) == date.fromisoformat(latest)


def test_show_prints_the_lines_that_are_asked_for(
    directory: Path, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write(3)
    flag = ["--audit-log", str(directory)]

    assert main(["audit", "show", *flag]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == [
        "log.begun",
        *3 * ["test.step"],
    ]
    assert main(["audit", "show", *flag, "--event", "log.", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["event"] for line in lines] == [
        "log.begun",
        "log.checkpoint",
        "log.checkpoint",
    ]
    assert main(["audit", "show", *flag, "--since", "2999-01-01"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("", 2, "say what to do"),
        ("show", 3, "holds no audit log"),
        ("verify", 3, "holds no audit log"),
        ("key", 3, "cannot read the public key"),
        ("show --since yesterday", 2, "takes a day as 2026-11-26"),
        ("prune --before 2026-13-01", 2, "takes a day as 2026-11-26"),
        ("prune --before 2020-01-01", 3, "holds no audit log"),
        ("acknowledge", 2, "--reason"),
        ("acknowledge --reason x", 3, "nothing is wrong"),
        ("verify --checkpoint missing.json", 3, "cannot read the checkpoint"),
        ("verify --public-key missing.pem", 3, "cannot read the public key"),
    ],
)
def test_what_cannot_be_done_says_why(
    arguments: str, code: int, words: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *arguments.split(), "--audit-log", str(directory)]) == code
    assert words in capsys.readouterr().err


def test_a_terminal_is_not_steered_by_a_name_in_the_log(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_directory(directory, who(""))
    log.append("test.name", {"path": "\x1b[31mred"})
    log.checkpoint()
    log.close()

    assert main(["audit", "show", "--audit-log", str(directory)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_verify_says_what_it_found(
    directory: Path, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(3)
    flag = ["--audit-log", str(directory)]
    kept = str(tmp_path / "kept.json")

    assert main(["audit", "export", kept, *flag]) == 0
    assert main(["audit", "key", *flag]) == 0
    (tmp_path / "key.pem").write_text(capsys.readouterr().out.partition("elsewhere.\n")[2])
    checks = ["--checkpoint", kept, "--public-key", str(tmp_path / "key.pem")]
    assert main(["audit", "verify", *checks, *flag]) == 0
    assert "note" not in capsys.readouterr().out
    path = directory / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"number":1', b'"number":2'))
    assert main(["audit", "verify", "--json", *flag]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == ["000001.jsonl, line 5: it does not follow the line before"]
    assert os.listdir(directory).count("000001.jsonl") == 1
