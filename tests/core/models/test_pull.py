"""`mst models pull`: only the hosts that were named, only a model's files, each as listed."""

from __future__ import annotations

import ast
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.stand_in_hub import COMMIT, StandIn

from mst import __version__, cli
from mst.hub.guard import HostRefused, check_url

CORE = Path(cli.__file__).resolve().parents[1]


def pull(hub: StandIn, *more: str, host: bool = True) -> int:
    allowed = ["--allow-host", hub.elsewhere] if host else []
    return cli.main(
        ["models", "pull", "org/tiny", "--endpoint", hub.endpoint, "--yes", *allowed, *more]
    )


def events(tmp_path: Path) -> list[dict[str, Any]]:
    files = sorted((tmp_path / "state" / "mst" / "audit").glob("*.jsonl"))
    return [json.loads(line) for each in files for line in each.read_text().splitlines()]


def test_a_model_is_pulled_checked_and_listed(
    hub: StandIn, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(hub) == 0, capsys.readouterr().err
    there = place / "org" / "tiny"
    names = {each.name for each in there.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "mst-source.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((there / "mst-source.json").read_text())["revision"] == COMMIT
    paths = [path for _, path, _ in hub.asked]
    assert not any("pytorch_model" in each or ".py" in each for each in paths)
    out = capsys.readouterr().out
    assert "pytorch_model.bin" in out

    assert cli.main(["models", "verify", "org/tiny"]) == 0
    assert "each as listed" in capsys.readouterr().out
    kinds = [each["event"] for each in events(tmp_path)]
    assert kinds[:2] == ["log.begun", "log.checkpoint"]
    for kind in ("pull.begun", "pull.listed", "pull.file", "pull.ended"):
        assert kind in kinds
    told = {e["facts"]["name"]: e["facts"] for e in events(tmp_path) if e["event"] == "pull.file"}
    assert told.keys() == names - {"mst-source.json"}
    assert pull(hub) == 1
    assert "there already" in capsys.readouterr().err


def test_nothing_is_told_of_this_machine(
    hub: StandIn, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_zqxvkw")
    monkeypatch.setenv("HTTP_PROXY", "http://u:zqxvkw@proxy.example:3128")

    assert pull(hub) == 0
    err = capfd.readouterr().err
    assert "the proxy proxy.example of HTTP_PROXY is not used" in err
    assert "zqxvkw" not in err
    for _, _, headers in hub.asked:
        assert "authorization" not in {name.lower() for name in headers}
        assert "torch" not in headers["user-agent" if "user-agent" in headers else "User-Agent"]


def test_a_token_goes_to_the_hub_and_nowhere_else(
    hub: StandIn, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("hf_zqxvkw\n")
    token.chmod(0o644)

    assert pull(hub, "--token-file", str(token)) == 1
    assert f"Run: chmod 0400 {token}" in capfd.readouterr().err
    assert not hub.asked
    token.chmod(0o600)
    assert pull(hub, "--token-file", str(token)) == 0
    sent = {host: {k.lower(): v for k, v in headers.items()} for host, _, headers in hub.asked}
    assert sent["localhost"]["authorization"] == "Bearer hf_zqxvkw"
    assert "authorization" not in sent[hub.elsewhere]
    out, err = capfd.readouterr()
    assert "zqxvkw" not in out + err
    assert "zqxvkw" not in "".join(map(json.dumps, events(tmp_path)))


def test_another_host_is_named_and_not_asked(
    hub: StandIn, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pull(hub, host=False) == 3
    err = capfd.readouterr().err
    assert f"--allow-host {hub.elsewhere}" in err
    assert "zqxvkw" not in err  # the signature in the address
    assert {host for host, _, _ in hub.asked} == {"localhost"}
    refused = [e["facts"] for e in events(tmp_path) if e["event"] == "pull.refused"]
    assert refused == [{"host": hub.elsewhere, "reason": "not named"}]
    assert not (place / "org" / "tiny").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": 401}, "refuses org/tiny (401; no token was sent)"),
        ({"status": 404}, "has no org/tiny"),
        ({"status": 500}, "answers 500"),
        ({"files": {"config.json": b"{}", "pytorch_model.bin": b"x"}}, "only as pickles"),
        ({"files": {"model.gguf": b"GGUF"}}, "no config.json"),
        ({"listed": {"model.safetensors": b"0" * 99}}, "model.safetensors"),
        ({"listed": {"config.json": b"{}"}}, "config.json"),
        ({"commit": "\x1b[2J"}, "a name that can't be shown"),
        ({"files": {"config.json": b"{}", "\x1b[2J.bin": b"x"}}, "'\\x1b[2J.bin'"),
    ],
)
def test_what_is_no_whole_model_is_refused(
    hub: StandIn,
    place: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: str,
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)

    assert pull(hub) == 1
    err = capfd.readouterr().err
    assert words in err
    assert "zqxvkw" not in err
    assert "\x1b" not in err
    assert not (place / "org" / "tiny").exists()


def test_a_file_with_another_hash_is_refused_by_name(
    hub: StandIn, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = hub.files["model.safetensors"]
    hub.listed = {"model.safetensors": whole}
    hub.files["model.safetensors"] = whole[:-1] + bytes([whole[-1] ^ 1])

    assert pull(hub) == 1
    assert "model.safetensors of 555555555555 is not what the hub lists" in capfd.readouterr().err
    # The others stay, for the same command to go on from.
    assert not list((place / "org").rglob("*.part/.model.safetensors.*"))


def test_a_hub_that_sends_without_end_fills_no_disk(hub: StandIn, place: Path) -> None:
    hub.more = 1 << 20

    assert pull(hub) == 1
    (part,) = place.rglob(".model.safetensors.*.part")
    assert part.stat().st_size <= len(hub.files["model.safetensors"])
    hub.more = 0
    assert pull(hub) == 0  # what it had fetched is the whole file


def test_an_allowed_host_is_not_asked_without_encryption(
    hub: StandIn, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.elsewhere = "cdn.example"

    assert pull(hub) == 3
    err = capfd.readouterr().err
    assert "sends us to cdn.example for model.safetensors of org/tiny over http" in err
    assert "zqxvkw" not in err
    check_url("https://cdn.example/x", ("cdn.example",))
    with pytest.raises(HostRefused):
        check_url("https://other.example/x", ("cdn.example",))


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_a_hub_that_is_not_there(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "modelscope":
        pytest.importorskip("modelscope_hub", reason="needs mst-train[hub]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = ["--endpoint", f"http://localhost:{port}", "--from", name]

    assert cli.main(["models", "pull", "org/tiny", "--yes", *endpoint]) == 1
    assert "no connection to localhost came about, for org/tiny" in capfd.readouterr().err


def test_a_revision_that_is_not_there(
    hub: StandIn, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pull(hub, "--revision", "v9") == 1
    assert "at revision v9" in capfd.readouterr().err


def test_a_connection_that_breaks_is_taken_up_again(hub: StandIn, place: Path) -> None:
    size = len(hub.files["model.safetensors"])
    hub.cut_once_after = size // 2

    assert pull(hub) == 0
    ranges = [headers["Range"] for _, _, headers in hub.asked if "Range" in headers]
    assert len(set(ranges)) == 1  # asked of the hub, then of where it leads to
    assert hub.sent < sum(map(len, hub.files.values())) + size // 4


def test_a_killed_pull_goes_on_where_it_was(hub: StandIn, place: Path) -> None:
    hub.chunk, hub.pause = 1 << 16, 0.05
    command = [
        sys.executable, "-m", "mst", "models", "pull", "org/tiny", "--endpoint", hub.endpoint,
        "--allow-host", hub.elsewhere, "--yes",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 60
        while not (found := part_bytes(place)) and time.monotonic() < until:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    hub.pause = 0.0

    assert found
    assert not (place / "org" / "tiny").exists()
    assert pull(hub) == 0
    ranges = [headers["Range"] for _, _, headers in hub.asked if "Range" in headers]
    assert ranges
    assert int(ranges[0].removeprefix("bytes=").rstrip("-").split("-")[0]) >= found


def part_bytes(place: Path) -> int:
    return sum(each.stat().st_size for each in place.rglob(".model.safetensors.*.part"))


def test_the_other_hub_is_asked_by_its_own_library(
    hub: StandIn,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("modelscope_hub", reason="needs mst-train[hub]")
    logins = tmp_path / "netrc"
    logins.write_text("default login liu password zqxvkw\n")
    logins.chmod(0o600)
    monkeypatch.setenv("NETRC", str(logins))
    monkeypatch.setenv("MODELSCOPE_CLOUD_USERNAME", "zqxvkw")
    token = tmp_path / "token"
    token.write_text("ms-zqxvkw")
    token.chmod(0o600)
    more = ["--from", "modelscope", "--token-file", str(token)]

    assert pull(hub, *more, host=False) == 3
    assert f"--allow-host {hub.elsewhere}" in capfd.readouterr().err
    assert {host for host, _, _ in hub.asked} == {"localhost"}
    hub.cut_once_after = len(hub.files["model.safetensors"]) // 2
    assert pull(hub, *more) == 0
    assert [headers["Range"] for _, _, headers in hub.asked if "Range" in headers]
    assert (place / "org/tiny/model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert {headers["User-Agent"] for _, _, headers in hub.asked} == {f"mst/{__version__}"}
    assert "Basic " not in json.dumps([headers for _, _, headers in hub.asked])
    sent = [json.dumps(headers) for host, _, headers in hub.asked if host == hub.elsewhere]
    assert "zqxvkw" not in "".join(sent)
    out, err = capfd.readouterr()
    assert "zqxvkw" not in out + err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["org/tiny"], 2, "a person has to agree"),
        (["tiny", "--yes"], 2, "ORG/NAME"),
        (["../../etc", "--yes"], 1, "can't be called"),
        (["org/tiny", "--yes", "--endpoint", "http://hub.example"], 2, "not encrypted"),
        (["org/tiny", "--yes", "--endpoint", "https://u:p@hub.example"], 2, "without a name"),
        (["org/tiny", "--yes", "--endpoint", "file:///etc"], 2, "address of a hub"),
        (["org/tiny", "--yes", "--endpoint", "https://["], 2, "address of a hub"),
        (["org/tiny", "--yes", "--allow-host", "*"], 2, "one host"),
        (["org/tiny", "--yes", "--allow-host", "cdn.example:443"], 2, "scheme and port"),
    ],
)
def test_nothing_is_sent_without_a_plain_order(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert cli.main(["models", "pull", *arguments]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_a_person_is_asked_before_anything_is_sent(
    hub: StandIn, place: Path, answer: str, code: int
) -> None:
    import pexpect

    arguments = ["-m", "mst", "models", "pull", "org/tiny", "--endpoint", hub.endpoint]
    shell = pexpect.spawn(
        sys.executable, [*arguments, "--allow-host", hub.elsewhere], encoding="utf-8", timeout=60
    )
    shell.expect_exact("is fetched from localhost and 127.0.0.1")
    shell.expect_exact("[y/N] ")
    assert not hub.asked
    shell.sendline(answer)
    shell.expect(pexpect.EOF)
    shell.close()

    assert shell.exitstatus == code
    assert bool(hub.asked) == (answer == "y")


def test_a_machine_that_is_kept_offline_stays_so(
    hub: StandIn, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert pull(hub) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not hub.asked


def test_nothing_in_a_jail_pulls(
    hub: StandIn, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MST_SEAL", '{"layer": "x"}')

    assert pull(hub) == 3
    assert not hub.asked


def test_no_other_command_can_reach_a_hub() -> None:
    allowed = {"mst/cli/models.py"}
    users = set()
    for path in CORE.rglob("*.py"):
        name = path.relative_to(CORE.parent).as_posix()
        if name.startswith("mst/hub/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [each.name for each in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(each == "mst.hub" or each.startswith("mst.hub.") for each in modules):
                users.add(name)

    assert users == allowed


def test_a_missing_model_is_not_fetched_by_another_command(
    hub: StandIn, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)

    assert cli.main(["plan", "--model", "org/tiny"]) == 1
    assert "never downloads" in capsys.readouterr().err
    assert not hub.asked
