"""Commands are logged from before they read to their end, without a word of rows or texts."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mst
from mst.cli import COMMANDS, main
from mst.errors import AuditError, ModelError, MstError
from mst.seal.audit import command, open_log, record
from mst.seal.audit.arguments import WITHHELD, given
from mst.seal.audit.event import who
from mst.seal.audit.log import Log
from mst.seal.audit.opening import open_directory
from mst.seal.audit.reading import events
from mst.seal.audit.verification import verify

SECRET = "canary-7f3a91"


def facts_of(directory: Path, name: str) -> list[dict[str, Any]]:
    return [event["facts"] for _, event in events(directory, event=name)]


def holds(directory: Path, text: str) -> list[str]:
    return [each.name for each in directory.iterdir() if text.encode() in each.read_bytes()]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": each, "content": SECRET} for each in ("user", "assistant")]}
    path.write_text(f"{json.dumps(row)}\n" * 12)
    return path


def test_a_command_is_logged_with_its_files(
    directory: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(rows), "--audit-log", str(directory)]) == 0
    (begun,), (ended,) = (facts_of(directory, f"command.{each}") for each in ("begun", "ended"))
    (checked,) = facts_of(directory, "data.checked")

    assert begun["options"] == {
        "action": "check", "audit-log": str(directory), "paths": [str(rows)]
    }  # fmt: skip
    assert ended["code"] == 0
    assert checked["files"][0]["path"] == str(rows.resolve())
    assert len(checked["files"][0]["sha256"]) == 64
    assert holds(directory, SECRET) == []
    assert verify(directory).problems == ()
    assert verify(directory).unsigned == 0


def test_a_refusal_is_logged_by_its_class(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--audit-log", str(directory), "--prompt", SECRET, "--system", SECRET]

    assert main(["chat", "no-such-model", *flags]) == 1
    assert facts_of(directory, "command.begun")[0]["options"]["prompt"] == WITHHELD
    assert facts_of(directory, "command.ended")[0]["error"] == "ModelError"
    assert holds(directory, SECRET) == []


@pytest.mark.parametrize("name", ["devices", "plugins", "runs", "doctor --help", "train --help"])
def test_commands_that_read_neither_data_nor_weights_are_not_logged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    try:
        code: object = main(name.split())
    except SystemExit as leaving:
        code = leaving.code

    assert code == 0
    assert not (tmp_path / "mst").exists()


def test_looking_around_loads_no_cryptography() -> None:
    code = (
        "import sys; from mst.cli import main; main(['--help']); main(['devices'])\n"
        "sys.exit(','.join({'cryptography', 'rfc8785', 'platformdirs'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(command.LOGGED & COMMANDS.keys()))
def test_every_logged_command_takes_the_directory(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--audit-log DIR" in capsys.readouterr().out


def test_a_command_without_a_log_does_not_begin(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()

    assert main(["data", "check", str(rows), "--audit-log", str(tmp_path / "file/audit")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "AuditError: cannot make the audit log's directory" in err
    assert "--audit-log DIR" in err


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root, where mounting is allowed")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            return


@pytest.mark.parametrize("begun", [False, True])
def test_on_a_full_disk_nothing_begins_and_the_log_stays_whole(
    begun: bool, full_disk: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = full_disk / "audit"
    check = ["data", "check", str(rows), "--audit-log", str(directory)]
    if begun:
        assert main(check) == 0
    fill(full_disk)
    capsys.readouterr()
    code = 0
    for _ in range(40):  # the last page of a file has some room left
        code = code or main(check)

    assert code == 3
    assert "No space left on device" in capsys.readouterr().err
    (full_disk / "filler").unlink()
    if begun:
        assert main(check) == 0
        assert verify(directory).problems == ()


def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let all events but the first fail, until the function that is returned is called."""
    real = Log.append
    state = {"fails": True}

    def append(self: Log, event: str, *rest: Any) -> None:
        if event != "command.begun" and state["fails"]:
            raise AuditError("cannot write the audit log: No space left on device.")
        real(self, event, *rest)

    monkeypatch.setattr(Log, "append", append)
    return lambda: state.update(fails=False)


def test_a_result_is_kept_when_the_log_fails_later(
    directory: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch)

    assert main(["data", "check", str(rows), "--audit-log", str(directory)]) == 3
    out, err = capsys.readouterr()
    assert "12 rows" in out
    assert err.count("The job goes on") == 1
    assert "mst data is done, and what it wrote is whole; but cannot write" in err
    assert facts_of(directory, "command.ended") == []
    assert verify(directory).unended == 1


def test_events_that_had_to_wait_are_written_in_their_order(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(directory, "test"):
        mend = failing(monkeypatch)
        record("test.one")
        record("test.two")
        mend()
        record("test.three")

    assert [event["event"] for _, event in events(directory, event="test")] == [
        "test.one",
        "test.two",
        "test.three",
    ]


def test_a_failure_of_the_log_does_not_hide_the_commands_own(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch)

    def fails() -> None:
        with open_log(directory, "test"):
            raise ModelError("its own")

    with pytest.raises(ModelError, match="its own"):
        fails()


def test_an_edited_log_stops_commands_until_it_is_acknowledged(
    directory: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["data", "check", str(rows), "--audit-log", str(directory)]

    assert main(check) == 0
    path = directory / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"code":0', b'"code":1'))
    assert main(check) == 3
    assert "was changed" in capsys.readouterr().err
    assert main(["audit", "acknowledge", "--reason", "a test", "--audit-log", str(directory)]) == 0
    assert main(check) == 0


def test_without_a_log_nothing_is_recorded_and_inside_one_no_other_is_opened(
    directory: Path,
) -> None:
    record("test.lost")
    with open_log(directory, "outer"):
        record("test.outer")
        with open_log(directory / "other", "inner"):
            record("test.inner")
    record("test.lost")

    assert [event["event"] for _, event in events(directory, event="test")] == [
        "test.outer",
        "test.inner",
    ]
    assert not (directory / "other").exists()


def test_neither_forks_nor_workers_have_the_log(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_directory(directory, who(""))
    flags = [fcntl.fcntl(each, fcntl.F_GETFD) for each in log._handles]
    log.close()
    with open_log(directory, "test"):
        with monkeypatch.context() as patch:
            patch.setattr("mst.seal.audit.command.os.getpid", lambda: -1)
            record("test.fork")
        record("test.own")

    assert len(flags) == 3
    assert all(each & fcntl.FD_CLOEXEC for each in flags)
    assert [event["event"] for _, event in events(directory, event="test")] == ["test.own"]


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (ModelError("no"), 1, "ModelError"),
        (AuditError("no"), 3, "AuditError"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (ValueError(SECRET), 1, "ValueError"),
        (SystemExit(4), 4, None),
    ],
)
def test_an_end_has_the_code_and_the_class(
    error: BaseException, code: int, name: str | None, directory: Path
) -> None:
    def fails() -> None:
        with open_log(directory, "test"):
            raise error

    with pytest.raises(type(error)):
        fails()
    (ended,) = facts_of(directory, "command.ended")
    assert (ended["code"], ended.get("error")) == (code, name)
    assert holds(directory, SECRET) == []


def test_texts_of_options_are_withheld_unless_they_are_known_to_be_none() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?", metavar="YAML")
    for name, metavar in (
        ("passphrase", None), ("prompt", "TEXT"), ("max-steps", "int"), ("rate", "float"),
        ("model", "PATH|NAME"), ("mode", "auto|on|off"), ("columns", "COLUMN=ROLE"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", metavar=metavar)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--quiet", action="store_true")
    line = (
        "--passphrase x --prompt x --max-steps x --rate 1e-4 --model a/b --mode x"
        " --columns q=prompt --rows 3 --quiet"
    )

    assert given(parser, parser.parse_args(line.split()))["options"] == {
        "passphrase": WITHHELD, "prompt": WITHHELD, "max-steps": WITHHELD, "rate": "1e-4",
        "model": "a/b", "mode": WITHHELD, "columns": "q=prompt", "rows": 3, "quiet": True,
    }  # fmt: skip
    assert given(parser, parser.parse_args(["--mode", "on"]))["options"] == {"mode": "on"}


def test_a_file_of_options_is_logged_by_its_hash(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?", metavar="YAML")
    (tmp_path / "tune.yaml").write_text(f"template: {SECRET}\n")
    found = given(parser, parser.parse_args([str(tmp_path / "tune.yaml")]))

    assert SECRET not in json.dumps(found)
    assert len(str(found["config_sha256"])) == 64


@pytest.mark.parametrize("text", ["directory = 5", "folder = 'x'", "directory", "\xff"])
def test_settings_that_cannot_be_used_are_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "mst").mkdir()
    (tmp_path / "mst/audit.toml").write_bytes(text.encode("latin-1"))

    assert main(["data", "check", str(rows)]) == 3
    assert str(tmp_path / "mst/audit.toml") in capsys.readouterr().err


def test_the_settings_move_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Path, directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "mst").mkdir()
    (tmp_path / "mst/audit.toml").write_text(f'directory = "{directory}"\n')

    assert main(["data", "check", str(rows)]) == 0
    assert len(facts_of(directory, "command.ended")) == 1
    assert verify(directory).unended == 0


def test_the_python_api_is_logged_as_the_command_is(directory: Path) -> None:
    with pytest.raises(MstError):
        mst.train(model="no-such-model", max_steps=1, audit_log=directory)
    (begun,) = facts_of(directory, "command.begun")

    assert (begun["name"], begun["api"]) == ("train", "mst.train")
    assert begun["options"] == {"model": "no-such-model", "max_steps": 1}
    assert facts_of(directory, "command.ended")[0]["error"] == "ModelError"


@pytest.mark.slow
def test_a_run_from_data_to_merge_is_logged_without_a_word_of_it(
    directory: Path, rows: Path, tiny_model: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, flag = tmp_path / "run", ["--audit-log", str(directory)]
    train = ["train", "--model", tiny_model, "--dataset", rows, "--output-dir", run, *flag]
    train += ["--device", "cpu", "--max-steps", 1, "--val-size", 2, "--threads", 1]
    train += ["--label-accuracy", "off"]

    assert main([str(each) for each in train]) == 0
    assert main(["eval", str(run), "--metric", "loss", *flag]) == 0
    chat = ["chat", str(run), "--prompt", SECRET, "--system", SECRET, "--max-new-tokens", "2"]
    assert main([*chat, *flag]) == 0
    assert main(["merge", str(run), *flag]) == 0
    assert holds(directory, SECRET) == []
    assert verify(directory).problems == ()
    (begun,), (ended,) = (facts_of(directory, f"train.{each}") for each in ("begun", "ended"))
    manifest = json.loads((run / "run.json").read_text())
    assert begun["data"][0]["sha256"] == manifest["data"][0]["sha256"]
    assert begun["model_sha256"] == manifest["model_sha256"]
    assert (begun["strategy"], begun["devices"], begun["resumed"]) == ("single", ["cpu"], False)
    assert (ended["status"], ended["outputs"]) == ("done", manifest["outputs"])
    (merged,) = facts_of(directory, "merge.ended")
    assert "model.safetensors" in merged["files"]
    (judged,) = facts_of(directory, "eval.ended")
    assert judged["data"][0]["sha256"] == manifest["data"][0]["sha256"]
    assert facts_of(directory, "chat.begun")[0]["model_sha256"] == manifest["model_sha256"]
    assert [each["code"] for each in facts_of(directory, "command.ended")] == [0, 0, 0, 0]
