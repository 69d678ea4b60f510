"""Training on encrypted rows leaves none of their words on any disk."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mst.cli import main
from mst.cli.train import show_outcome
from mst.request import TrainRequest
from mst.rundir import REQUEST, read_document, read_manifest, read_metrics
from mst.seal.keys.key_file import make_key_file

CANARIES = 200


def canary(number: int) -> str:
    """Return a word that stands in no vocabulary, file or log by chance."""
    return f"zq{number * 7919 + 104729:07d}xkcanary{number:03d}w"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a key and encrypted rows, of which no plain copy is kept."""
    path = tmp_path_factory.mktemp("sealed")
    for each in ("home", "tmp", "work"):
        (path / each).mkdir()
    rows = path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"where is {canary(n)}", "response": f"it is {canary(n)}"}) + "\n"
            for n in range(CANARIES)
        )
    )
    make_key_file(path / "key")
    done = mst(path, "data", "encrypt", rows, "--output", path / "rows.jsonl.mst", *key(path))
    assert done.returncode == 0, done.stderr
    rows.unlink()
    return path


def key(place: Path) -> list[str]:
    return ["--key-file", str(place / "key")]


def surroundings(place: Path) -> dict[str, str]:
    home, tmp = str(place / "home"), str(place / "tmp")
    return os.environ | {"HOME": home, "TMPDIR": tmp, "XDG_CACHE_HOME": f"{home}/.cache"}


def mst(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *map(str, arguments)],
        env=surroundings(place), cwd=place / "work", capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def training(place: Path, model: Path, run: str, *more: object) -> list[object]:
    return [
        "train", "--model", model, "--dataset", place / "rows.jsonl.mst", "--output-dir",
        place / "work" / run, "--device", "cpu", "--max-steps", 4, "--save-steps", 1,
        "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1, "--threads", 1,
        "--val-size", 0.02, *more,
    ]  # fmt: skip


def assert_no_words(place: Path, done: subprocess.CompletedProcess[str] | None = None) -> None:
    """Look for every canary in all that lies in the directory, in several guises."""
    guises: dict[bytes, int] = {}
    for number in range(CANARIES):
        text = canary(number)
        guises |= {text.encode(): number, text.encode("utf-16-le"): number}
        for shift in range(3):
            # Any place within a base64 text: whole groups of it alone.
            code = base64.b64encode(b"\0" * shift + text.encode())
            guises[code[4:-4]] = number
    said = [] if done is None else [(done.stdout + done.stderr).encode()]
    files = [each for each in place.rglob("*") if each.is_file() and not each.is_symlink()]
    for data in [*said, *(each.read_bytes() for each in files)]:
        # All canaries hold this; it makes the search of large files fast.
        for each in guises if _marked(data) else ():
            assert each not in data, f"canary {guises[each]}"


def _marked(data: bytes) -> bool:
    word = "xkcanary"
    codes = [base64.b64encode(b"\0" * n + word.encode())[4:-4] for n in range(3)]
    return any(each in data for each in (word.encode(), word.encode("utf-16-le"), *codes))


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    for text in (
        b"a" + canary(3).encode(),
        canary(4).encode("utf-16-le"),
        base64.b64encode(b"ab" + canary(5).encode() + b"c"),
    ):
        (tmp_path / "file").write_bytes(text)
        with pytest.raises(AssertionError, match="canary"):
            assert_no_words(tmp_path)


@pytest.mark.slow
def test_a_run_reads_encrypted_rows_and_keeps_none(tiny_model: Path, place: Path) -> None:
    done = mst(place, *training(place, tiny_model, "run", *key(place)))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "--compare base --key-file FILE\n" in done.stdout
    found = read_manifest(place / "work/run")
    assert found.status == "done"
    assert found.data[0].key.startswith("key-file ")
    events = mst(place, "audit", "show", "--event", "train.begun", "--json").stdout
    assert f'"key":"{found.data[0].key}"' in events
    assert len([each for each in read_metrics(place / "work/run") if "loss" in each]) == 4
    assert_no_words(place, done)

    for command in (
        ("merge", place / "work/run"),
        ("eval", place / "work/run", "--metric", "loss", "--device", "cpu", *key(place)),
    ):
        done = mst(place, *command)

        assert done.returncode == 0, done.stdout + done.stderr
        assert_no_words(place, done)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("", ""),
        ("key-file 0123456789abcdef", " --key-file FILE"),
        ("passphrase", ""),
        ("systemd-creds", ""),
        ("pkcs11:token=t;object=k", " --pkcs11 URI"),
    ],
)
def test_the_next_commands_name_the_key_that_has_to_be_named(
    key: str, options: str, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(finished_run)
    data = tuple(replace(each, key=key) for each in manifest.data)
    request = read_document(TrainRequest, finished_run, REQUEST)
    show_outcome(Console(), finished_run, replace(manifest, data=data), request)

    assert f"--compare base{options}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_leaves_no_words_and_goes_on_with_the_key(
    tiny_model: Path, place: Path
) -> None:
    run = place / "work/killed"
    arguments = training(
        place, tiny_model, "killed", "--streaming", "--max-steps", 200, *key(place)
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "mst", *map(str, arguments)],
        env=surroundings(place), cwd=place / "work", start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*/")) and time.monotonic() < deadline:
        time.sleep(0.05)
    words = b"\0".join(
        each.read_bytes()
        for name in ("cmdline", "environ")
        for each in Path("/proc").glob(f"[0-9]*/{name}")
        if _of_session(each.parent, child.pid)
    )
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    # The worker holds the run until the kernel has cleared it away.
    while any(_of_session(each, child.pid) for each in Path("/proc").glob("[0-9]*")):
        time.sleep(0.05)

    secret = (place / "key").read_text().split("mst-key-v1:")[1].strip()
    assert b"mst.training.worker" in words
    assert secret.encode() not in words
    assert base64.b64decode(secret).hex().encode() not in words
    assert_no_words(place)

    resume = ("train", "--output-dir", run, "--resume", "--max-steps", 5, "--device", "cpu")
    done = mst(place, *resume)

    assert done.returncode == 1
    assert "no key was given" in done.stderr
    assert_no_words(place, done)

    steps = max(int(each.name[5:]) for each in run.glob("checkpoints/step-*"))
    done = mst(place, *resume[:4], "--max-steps", steps + 2, "--device", "cpu", *key(place))

    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(run).status == "done"
    assert_no_words(place, done)


def _of_session(process: Path, session: int) -> bool:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session
    except (OSError, IndexError):
        return False


def test_errors_tell_no_words(
    tiny_model: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, surroundings(place)[name])
    damaged, bad = place / "damaged.jsonl.mst", place / "bad.jsonl"
    data = bytearray((place / "rows.jsonl.mst").read_bytes())
    data[-40] ^= 1
    damaged.write_bytes(data)
    bad.write_text("".join(f'{{"prompt": "{canary(n)}\n' for n in range(3)))
    main(["data", "encrypt", str(bad), *key(place)])
    bad.unlink()
    run = place / "work/refused"
    train = ["train", "--model", tiny_model, "--output-dir", run, "--device", "cpu", "--dataset"]
    check = ["data", "check", "--model", tiny_model]
    for command, said in (
        ([*check, damaged, *key(place)], "is not what was encrypted"),
        ([*check, f"{bad}.mst", *key(place)], "not valid JSON"),
        ([*train, damaged, *key(place)], "is not what was encrypted"),
        ([*train, f"{bad}.mst", *key(place)], "not valid JSON"),
        ([*train, place / "rows.jsonl.mst"], "no key was given"),
    ):
        code = main([str(each) for each in command])
        out = "".join(capfd.readouterr())

        assert code == 1
        assert said in out
        assert "canary" not in out
        assert not run.exists()
        assert_no_words(place)
