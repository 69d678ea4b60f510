"""`mst data keygen|encrypt|decrypt|rekey|verify`, and what they refuse."""

from __future__ import annotations

import errno
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mst.cli import main
from mst.errors import EncryptionError
from mst.seal.container.layout import SEGMENT_BYTES
from mst.seal.keys.key_file import make_key_file, read_key_file
from mst.seal.keys.passphrase import read_passphrase
from mst.seal.keys.ring import handed_down, inherited, ring_of


@pytest.fixture
def phrase(tmp_path: Path) -> Path:
    path = tmp_path / "phrase"
    path.write_text("five words that nobody guesses\n")
    path.chmod(0o600)
    return path


def encrypted(rows: Path, key_file: Path) -> Path:
    assert main(["data", "encrypt", str(rows), "--key-file", str(key_file)]) == 0
    return rows.with_name(rows.name + ".mst")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with a message of ours, and return the message."""
    capsys.readouterr()
    code = main(["data", *map(str, arguments)])
    error = capsys.readouterr().err

    assert code in (1, 2)
    assert "Error: " in error
    assert "Traceback" not in error
    return error


def test_there_and_back(
    rows: Path, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows.read_bytes()
    path = encrypted(rows, key_file)

    assert "doesn't erase it" in capsys.readouterr().out
    assert rows.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"question" not in path.read_bytes()

    back = tmp_path / "back.jsonl"
    named = ["--key-file", str(key_file)]
    assert main(["data", "verify", str(path), *named]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    assert main(["data", "decrypt", str(path), "--output", str(back), *named]) == 0
    assert back.read_bytes() == data
    assert stat.S_IMODE(back.stat().st_mode) == 0o600


def test_rekey_changes_the_keys_and_not_the_segments(
    rows: Path, key_file: Path, phrase: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = encrypted(rows, key_file)
    before = path.read_bytes()
    old, new = ["--key-file", str(key_file)], ["--passphrase-file", str(phrase)]
    assert main(["data", "rekey", str(path), *old, "--new-passphrase-file", str(phrase)]) == 0
    assert path.read_bytes()[-1000:] == before[-1000:]
    assert main(["data", "verify", str(path), *new]) == 0
    assert "does not open with key-file" in refused(capsys, "verify", path, *old)

    assert main(["data", "rekey", str(path), *new, "--add", "--new-key-file", str(key_file)]) == 0
    assert main(["data", "verify", str(path), *new]) == 0
    assert main(["data", "verify", str(path), *old]) == 0
    assert "no key was named" in refused(capsys, "rekey", path, *old)


def test_a_key_that_others_can_read_is_refused(
    rows: Path, key_file: Path, phrase: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file.chmod(0o440)
    phrase.chmod(0o644)

    error = refused(capsys, "encrypt", rows, "--key-file", key_file)
    assert f"mode 0440), so it is no secret. Run: chmod 0400 {key_file}" in error
    error = refused(capsys, "encrypt", rows, "--passphrase-file", phrase)
    assert f"chmod 0400 {phrase}" in error
    assert not rows.with_name("rows.jsonl.mst").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "no key file"),
        (b"mst-key-v1:AAAA\n", "no key file"),
        (b"mst-key-v1:not base64!\n", "no key file"),
        (b"\xff\xfe\0\0", "no key file"),
        (b"x" * 5000, "longer than 4096 bytes"),
    ],
)
def test_what_is_no_key_file_is_refused(text: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(text)
    path.chmod(0o400)
    with pytest.raises(EncryptionError, match=problem):
        read_key_file(path)


def test_bad_input_is_refused_in_words(
    rows: Path, key_file: Path, phrase: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = encrypted(rows, key_file)
    key = ["--key-file", str(key_file)]
    other, empty, plain, newer, short = (
        tmp_path / name
        for name in ("other", "empty.jsonl", "plain.jsonl.mst", "newer.jsonl.mst", "short")
    )
    make_key_file(other)
    empty.touch()
    plain.write_bytes(rows.read_bytes())
    newer.write_bytes(path.read_bytes()[:8] + b"\0\2" + path.read_bytes()[10:])
    renamed = tmp_path / "renamed.jsonl"
    shutil.copy(path, renamed)
    short.write_text("word\n")
    short.chmod(0o600)

    assert "exists already" in refused(capsys, "encrypt", rows, *key)
    assert "exists already" in refused(capsys, "decrypt", path, *key)
    assert "exists already" in refused(capsys, "keygen", "--key-file", key_file)
    assert "is empty" in refused(capsys, "encrypt", empty, *key)
    assert "encrypted already" in refused(capsys, "encrypt", renamed, *key)
    assert "suffix" in refused(capsys, "encrypt", other, *key)
    assert "no key was named" in refused(
        capsys, "encrypt", rows, "--output", tmp_path / "new.jsonl.mst"
    )
    assert "begins with other bytes" in refused(capsys, "verify", plain, *key)
    assert "version 2 of the format" in refused(capsys, "verify", newer, *key)
    assert "is empty" in refused(capsys, "verify", empty, *key)
    assert "does not open with key-file" in refused(capsys, "verify", path, "--key-file", other)
    assert "no key was given" in refused(capsys, "verify", path)
    assert "No such file" in refused(capsys, "verify", tmp_path / "gone.mst", *key)
    assert "No such file" in refused(capsys, "verify", path, "--key-file", tmp_path / "gone")
    assert "at least 8 are needed" in refused(
        capsys, "encrypt", rows, "--passphrase-file", short, "--output", tmp_path / "n.jsonl.mst"
    )
    assert "there is no directory" in refused(
        capsys, "encrypt", rows, *key, "--output", tmp_path / "no/such.jsonl.mst"
    )


def test_a_wrong_passphrase_is_refused(
    rows: Path, phrase: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "encrypt", str(rows), "--passphrase-file", str(phrase)]) == 0
    path = rows.with_name("rows.jsonl.mst")
    phrase.write_text("five words that somebody guesses\n")
    error = refused(capsys, "verify", path, "--passphrase-file", phrase)

    assert "does not open with a passphrase" in error
    assert "somebody" not in error


def test_a_passphrase_comes_through_a_file_descriptor() -> None:
    read, write = os.pipe()
    os.write(write, b"through a pipe\nnot this line")
    os.close(write)
    try:
        assert read_passphrase(Path(f"/dev/fd/{read}")) == b"through a pipe"
    finally:
        os.close(read)


def large(path: Path) -> Path:
    path.write_bytes((b'{"prompt": "q", "response": "' + b"a" * 970 + b'"}\n') * 3000)
    return path


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_write_that_fails_leaves_nothing(
    unnamed: bool, tmp_path: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = large(tmp_path / "large.jsonl")
    before = source.read_bytes()
    # What file systems and kernels without unnamed files make of the flag: EISDIR.
    unnamed_flag = "os.O_TMPFILE" if unnamed else "os.O_DIRECTORY"
    command = f"""if True:
        import os, resource, sys
        from mst.cli import main
        os.O_TMPFILE = {unnamed_flag}
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        sys.exit(main(sys.argv[1:]))"""
    done = subprocess.run(
        [sys.executable, "-c", command, "data", "encrypt", source, "--key-file", key_file],
        # A log of its own: the one that all tests share may have outgrown the limit.
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 1
    assert "File too large), and nothing of it was left behind" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["key", "large.jsonl"]
    assert source.read_bytes() == before


def test_a_full_disk_leaves_the_source_untouched(
    tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        source = large(tmp_path / "large.jsonl")
        error = refused(
            capsys, "encrypt", source, "--key-file", key_file, "--output", disk / "l.jsonl.mst"
        )

        assert os.strerror(errno.ENOSPC) in error
        assert os.listdir(disk) == []
        assert len(source.read_bytes()) == 3000 * 1002
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("action", ["encrypt", "decrypt"])
def test_a_killed_command_leaves_nothing_that_looks_whole(
    action: str, tmp_path: Path, key_file: Path
) -> None:
    source = large(tmp_path / "large.jsonl")
    if action == "decrypt":
        source = encrypted(source, key_file)
        (tmp_path / "large.jsonl").unlink()
    before = sorted(os.listdir(tmp_path))
    # Killed between two segments of the file that is written.
    command = """if True:
        import os, sys
        from mst.cli import main
        from mst.seal.container import output
        opened = output.os.fdopen
        class Killed:
            def __init__(self, file): self.file, self.left = file, 5
            def __getattr__(self, name): return getattr(self.file, name)
            def __enter__(self): return self
            def __exit__(self, *error): self.file.close()
            def write(self, data):
                self.left -= 1
                if not self.left: os.kill(os.getpid(), 9)
                self.file.write(data); self.file.flush()
        output.os = type("os", (), {**vars(os), "fdopen": lambda *a: Killed(opened(*a))})
        main(sys.argv[1:])"""
    done = subprocess.run(
        [sys.executable, "-c", command, "data", action, source, "--key-file", key_file], timeout=60
    )

    assert source.stat().st_size > SEGMENT_BYTES * 6
    assert done.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_that_grows_while_it_is_read_is_refused(
    rows: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mst.seal.container import writer
    from mst.seal.container.cipher import Segments

    def growing(*arguments: Any) -> Any:
        with rows.open("ab") as file:
            file.write(b"{}\n")
        return Segments(*arguments)

    monkeypatch.setattr(writer, "Segments", growing)

    assert "changed its size" in refused(capsys, "encrypt", rows, "--key-file", key_file)
    assert not rows.with_name("rows.jsonl.mst").exists()


def test_workers_inherit_keys_by_a_descriptor_alone(sealed: Path, key_file: Path) -> None:
    ring = ring_of(str(key_file), None)
    ring.open(sealed).close()
    with handed_down(ring) as handle:
        assert handle is not None
        assert os.readlink(f"/proc/self/fd/{handle}").startswith("/memfd:")
        found = inherited(os.dup(handle))
    with found.open(sealed) as opened:
        assert found.way_to(opened) == f"key-file {ring.way_to(opened).split()[1]}"
    assert "b'" not in repr(found)
    with handed_down(ring_of(None, None)) as handle:
        assert handle is None


def test_a_credential_of_this_machine_opens_a_file(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("systemd-creds") is None:
        pytest.skip("systemd-creds is not on this machine")
    code = main(["data", "encrypt", str(rows), "--systemd-creds"])
    if code:
        assert "systemd-creds encrypt failed" in capsys.readouterr().err
        pytest.skip("systemd-creds works for root on a machine with a secret")
    path = rows.with_name("rows.jsonl.mst")

    assert main(["data", "verify", str(path)]) == 0
    assert "opened with systemd-creds" in capsys.readouterr().out


def test_without_systemd_creds_the_error_says_so(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    assert "systemd 250" in refused(capsys, "encrypt", rows, "--systemd-creds")


def test_a_directory_with_both_copies_is_refused(rows: Path, key_file: Path) -> None:
    from mst.data.sources import find_source
    from mst.errors import DataError

    path = encrypted(rows, key_file)
    directory = path.parent / "both"
    directory.mkdir()
    shutil.move(path, directory)

    assert find_source(str(directory)).files == (directory / path.name,)
    shutil.copy(rows, directory)
    with pytest.raises(DataError, match="read twice"):
        find_source(str(directory))


def at_terminal(answers: list[bytes], *arguments: object) -> tuple[int, bytes]:
    """Run a command at a terminal of its own, answer its questions; return its code and words."""
    terminal, inner = pty.openpty()
    # Standard input of a session without a terminal becomes its terminal, which /dev/tty names.
    command = """if True:
        import fcntl, sys, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        from mst.cli import main
        sys.exit(main(sys.argv[1:]))"""
    child = subprocess.Popen(
        [sys.executable, "-c", command, "data", *map(str, arguments)],
        stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    said = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        said += piece
        if answers and (piece.endswith(b": ") or not piece):
            os.write(terminal, answers.pop(0) + b"\n")
    os.close(terminal)
    return child.wait(timeout=30), said


def test_a_passphrase_is_asked_for_at_the_terminal(rows: Path) -> None:
    phrase = b"five words asked at a terminal"
    code, said = at_terminal([phrase, b"five other words"], "encrypt", rows, "--passphrase")
    assert (code, b"differ" in said) == (1, True)
    code, said = at_terminal([phrase, phrase], "encrypt", rows, "--passphrase")
    assert code == 0, said
    assert phrase not in said
    code, said = at_terminal([phrase], "verify", f"{rows}.mst")
    assert b"opened with passphrase" in said
    code, said = at_terminal([b"a wrong passphrase"], "verify", f"{rows}.mst")
    assert (code, b"does not open with a passphrase" in said) == (1, True)
