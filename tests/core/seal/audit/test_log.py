"""Writing: one chain for all processes, whole after a power cut, and never half an event."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from mst.errors import AuditError
from mst.seal.audit import log as log_module
from mst.seal.audit.event import line_of, make, plain, who
from mst.seal.audit.log import Log
from mst.seal.audit.opening import open_directory
from mst.seal.audit.reading import events
from mst.seal.audit.verification import verify


def named(directory: Path, name: str) -> list[dict[str, Any]]:
    return [event for _, event in events(directory, event=name)]


def append_many(directory: str, name: str, count: int) -> None:
    log = open_directory(Path(directory), who(name))
    for number in range(count):
        log.append("test.step", {"number": number})
    log.checkpoint()
    log.close()


def test_two_processes_keep_one_chain(directory: Path) -> None:
    # Started afresh: they race for the first opening too.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=append_many, args=(str(directory), name, 200)) for name in "ab"
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(60)
    steps = named(directory, "test.step")

    assert [each.exitcode for each in processes] == [0, 0]
    assert verify(directory).problems == ()
    for name in "ab":
        numbers = [each["facts"]["number"] for each in steps if each["command"] == name]
        assert numbers == list(range(200))
    assert len(named(directory, "log.begun")) == 1


def test_two_openings_in_turn_keep_one_chain(directory: Path) -> None:
    one, other = (open_directory(directory, who(each)) for each in "ab")
    for _ in range(100):
        one.append("test.one", {})
        other.append("test.other", {})
    one.close()
    other.close()

    assert verify(directory).problems == ()
    assert [len(named(directory, each)) for each in ("test.one", "test.other")] == [100, 100]


@pytest.mark.parametrize("torn", [b'{"command":"the-end-of-a-secret', b"\x00" * 300, b"{"])
def test_a_torn_last_line_is_dropped_and_recorded(torn: bytes, directory: Path, write: Any) -> None:
    write(3)
    with (directory / "000001.jsonl").open("ab") as file:
        file.write(torn)

    assert "torn" in verify(directory).problems[0]
    write(3)
    (repaired,) = named(directory, "log.repaired")
    assert repaired["facts"] == {
        "dropped_bytes": len(torn),
        "sha256": hashlib.sha256(torn).hexdigest(),
    }
    assert verify(directory).problems == ()
    assert b"secret" not in (directory / "000001.jsonl").read_bytes()


def test_events_of_a_process_that_was_killed_stay(directory: Path) -> None:
    killed = open_directory(directory, who(""))
    killed.append("test.before", {})
    killed.close()  # without a checkpoint

    assert verify(directory).unsigned == 1
    log = open_directory(directory, who(""))
    log.append("test.after", {})
    log.checkpoint()
    log.close()
    assert verify(directory).problems == ()
    assert len(named(directory, "test.before")) == 1


@pytest.mark.parametrize("where", ["first file", "middle", "last line", "end", "all", "head"])
def test_a_changed_log_is_not_written_to(where: str, copied: Path) -> None:
    path = sorted(copied.glob("*.jsonl"))[0 if where == "first file" else -1]
    data = path.read_bytes()
    if where in ("first file", "middle"):
        path.write_bytes(data.replace(b'"number":5', b'"number":6', 1))
    elif where == "last line":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif where == "end":
        path.write_bytes(data[: data.rfind(b"\n", 0, -1) + 1])
    elif where == "head":
        value = json.loads((copied / "head.json").read_text())
        value["checkpoint"]["facts"]["size"] += 1
        (copied / "head.json").write_text(json.dumps(value))
    else:
        for each in copied.glob("*.jsonl"):
            each.unlink()

    with pytest.raises(AuditError, match="was changed") as caught:
        open_directory(copied, who(""))
    assert "mst audit acknowledge --reason" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_log_that_is_changed_while_it_is_open_takes_no_more(directory: Path, write: Any) -> None:
    write(3)
    log = open_directory(directory, who(""))
    with (directory / "000001.jsonl").open("ab") as file:
        file.write(line_of(make("test.forged", {}, 99, "0" * 64, who(""), "")) + b"\n")

    with pytest.raises(AuditError, match="was changed"):
        log.append("test.step", {})
    log.close()


def test_a_lost_or_torn_head_is_made_again_and_recorded(directory: Path, write: Any) -> None:
    for left in (b'{"check', None):
        write(2)
        (directory / "head.json").unlink()
        if left is not None:
            (directory / "head.json").write_bytes(left)

        assert "head.json" in verify(directory).problems[0]
    write(2)
    assert [each["facts"] for each in named(directory, "log.repaired")] == 2 * [
        {"file": "head.json"}
    ]
    assert (directory / "head.json").stat().st_mode & 0o777 == 0o600
    assert verify(directory).problems == ()


def test_an_event_is_written_once_when_its_checkpoint_fails(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_directory(directory, who(""))
    with monkeypatch.context() as patch:
        patch.setattr("mst.seal.audit.log.os.fdatasync", failing_sync)
        for _ in range(130):
            log.append("test.step", {})
    log.checkpoint()
    log.close()

    assert len(named(directory, "test.step")) == 130
    assert verify(directory).problems == ()


def failing_sync(handle: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_no_half_event(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_directory(directory, who(""))
    log.append("test.before", {})
    real = os.write

    def full(handle: int, data: bytes) -> int:
        return real(handle, data[: len(data) // 2])

    monkeypatch.setattr("mst.seal.audit.log.os.write", full)
    with pytest.raises(AuditError, match=r"No space left on device.*--audit-log DIR"):
        log.append("test.lost", {})
    monkeypatch.undo()
    log.append("test.after", {})
    log.checkpoint()
    log.close()

    assert verify(directory).problems == ()
    assert [event["event"] for _, event in events(directory, event="test")] == [
        "test.before",
        "test.after",
    ]


def test_the_kernels_own_refusal_leaves_no_half_event(directory: Path, write: Any) -> None:
    write(1)
    log = open_directory(directory, who(""))
    size = (directory / "000001.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))  # SIGXFSZ is ignored
    try:
        with pytest.raises(AuditError, match="cannot write the audit log"):
            log.append("test.lost", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.append("test.after", {})
    log.checkpoint()
    log.close()

    assert verify(directory).problems == ()


def test_a_clock_that_goes_back_is_recorded(
    directory: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(1)
    monkeypatch.setattr(log_module, "now", lambda: "2020-01-01T00:00:00.000000Z")
    write(2)
    (found,) = named(directory, "log.clock_went_back")

    assert found["time"] == "2020-01-01T00:00:00.000000Z"
    assert found["facts"]["seconds"] > 10**8
    assert verify(directory).problems == ()


def test_opening_does_not_grow_with_the_log(directory: Path, write: Any) -> None:
    def bytes_read() -> int:
        before = _rchar()
        open_directory(directory, who("")).close()
        return _rchar() - before

    write(1)
    small = bytes_read()
    write(100, text="x" * 1_000_000)
    began = time.perf_counter()
    large = bytes_read()

    assert (directory / "000001.jsonl").stat().st_size > 100_000_000
    assert large < small + 20_000
    assert time.perf_counter() - began < 1


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_an_event_takes_less_than_a_millisecond(directory: Path) -> None:
    log = open_directory(directory, who(""))
    began = time.process_time()
    for number in range(500):
        log.append("test.step", {"number": number, "sha256": "0" * 64})
    log.checkpoint()
    seconds = time.process_time() - began
    log.close()

    assert seconds / 500 < 0.001


def test_a_full_file_is_followed_by_a_new_one(directory: Path, write: Any) -> None:
    for _ in range(3):
        write(10, segment_bytes=2000)

    assert [each.name for each in verify(directory).files] == [
        "000001.jsonl",
        "000002.jsonl",
        "000003.jsonl",
    ]
    assert verify(directory).problems == ()


def test_a_new_month_begins_a_new_file(
    directory: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(1)
    monkeypatch.setattr("mst.seal.audit.opening.now", lambda: "2999-01-01T00:00:00.000000Z")
    write(1)

    assert len(verify(directory).files) == 2


def test_no_new_file_is_begun_under_a_running_command(directory: Path, write: Any) -> None:
    running = open_directory(directory, who(""))
    write(10, segment_bytes=1)
    running.append("test.step", {})
    running.checkpoint()
    running.close()

    assert len(verify(directory).files) == 1
    assert verify(directory).problems == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take its own rights away")
def test_a_log_is_written_after_rights_were_dropped(directory: Path, write: Any) -> None:
    write(1)
    log = open_directory(directory, who(""))
    os.seteuid(65534)
    try:
        for _ in range(100):
            log.append("test.step", {})
        log.checkpoint()
    finally:
        os.seteuid(0)
    log.close()

    assert verify(directory).problems == ()


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_directory_that_others_can_look_into_is_refused(
    mode: int, directory: Path, write: Any
) -> None:
    write(1)
    directory.chmod(mode)

    with pytest.raises(AuditError, match=f"mode {mode:04o}.*chmod 700"):
        write(1)


@pytest.mark.parametrize("mode", [0o444, 0o440, 0o600, 0o777])
def test_a_key_of_another_mode_is_refused(mode: int, directory: Path, write: Any) -> None:
    write(1)
    (directory / "key").chmod(mode)

    with pytest.raises(AuditError, match=f"mode {mode:04o}; it must be 0400.*chmod 400"):
        write(1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["key", "."])
def test_what_belongs_to_another_is_refused(name: str, directory: Path, write: Any) -> None:
    write(1)
    os.chown(directory / name, 65534, 65534)

    with pytest.raises(AuditError, match="belongs to user 65534, not to you"):
        write(1)


def test_a_lost_key_is_refused(directory: Path, write: Any) -> None:
    write(1)
    (directory / "key").unlink()

    with pytest.raises(AuditError, match=r"has lost its key.*mst audit acknowledge"):
        write(1)


def test_another_key_is_refused(directory: Path, write: Any, tmp_path: Path) -> None:
    from mst.seal.audit.key import create

    write(1)
    (directory / "key").unlink()
    create(directory)

    with pytest.raises(AuditError, match="not the one that its checkpoints are signed with"):
        write(1)


def test_a_damaged_key_is_refused_without_a_word_of_it(directory: Path, write: Any) -> None:
    write(1)
    (directory / "key").chmod(0o600)
    (directory / "key").write_text("-----BEGIN PRIVATE KEY-----\nsecret\n")
    (directory / "key").chmod(0o400)

    with pytest.raises(AuditError, match="is damaged") as caught:
        write(1)
    assert "secret" not in str(caught.value)


def test_modes_are_those_of_the_owner_alone(directory: Path, write: Any) -> None:
    write(1)
    modes = {each.name: each.stat().st_mode & 0o777 for each in directory.iterdir()}

    assert directory.stat().st_mode & 0o777 == 0o700
    assert modes == {"000001.jsonl": 0o600, "head.json": 0o600, "key": 0o400, "key.pub": 0o444}


def test_what_json_has_no_word_for_is_written_as_text(directory: Path) -> None:
    class Row:
        def __repr__(self) -> str:
            return "a secret row"

    odd = {
        "large": 2**63, "nan": float("nan"), "path": Path("a"), "bytes": "\udcff", "row": Row(),
        "many": (1, True, None, {"x": 1.5}),
    }  # fmt: skip
    log: Log = open_directory(directory, who(""))
    log.append("test.odd", odd)
    log.checkpoint()
    log.close()

    assert verify(directory).problems == ()
    assert named(directory, "test.odd")[0]["facts"] == {
        "large": str(2**63), "nan": "nan", "path": "a", "bytes": "\\udcff", "row": "<Row>",
        "many": [1, True, None, {"x": 1.5}],
    }  # fmt: skip
    assert plain(2**53 - 1) == 2**53 - 1
