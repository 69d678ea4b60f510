"""`mst ui` as it is run: in its jail, over real sockets, with a run that it starts and stops."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mst import background, rundir
from mst.cli import main
from mst.errors import UsageError

pytestmark = pytest.mark.slow
# A run that goes on until it is stopped, with little between its first step and its command.
ENDLESS = {
    "device": "cpu", "max_steps": 1_000_000, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1, "label_accuracy": "off", "threads": 1, "val_size": 0,
    "learning_rate": 0.001, "logging_steps": 5, "async_save": "off",
    "lr_scheduler_type": "constant", "torch_compile": "off",
}  # fmt: skip


@dataclass
class Ui:
    """A page's server that runs.

    Attributes:
        process: of the command.
        home: the audit log and the state directory lie here.
        runs: directory of runs.
        lines: that it has printed.
        cookie: of a session, once one was entered.
    """

    process: subprocess.Popen[str]
    home: Path
    runs: Path
    lines: list[str] = field(default_factory=list)
    cookie: str = ""
    reader: threading.Thread = field(default_factory=threading.Thread)

    def links(self) -> list[str]:
        return [each.split()[1] for each in self.lines if each.startswith("page ")]

    @property
    def port(self) -> int:
        return int(self.links()[0].split(":")[2].partition("/")[0])

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        given = {"Cookie": self.cookie, "Origin": f"http://127.0.0.1:{self.port}"}
        if body is not None:
            given["Content-Type"] = "application/json"
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        made.request(method, path, None if body is None else json.dumps(body), given | headers)
        reply = made.getresponse()
        text, cookie = reply.read().decode(), reply.getheader("Set-Cookie")
        made.close()
        if cookie:
            self.cookie = cookie.partition(";")[0]
        is_json = reply.getheader("Content-Type") == "application/json"
        return reply.status, json.loads(text) if is_json else text

    def enter(self) -> str:
        """Come in, and return the token that was used up."""
        token = self.links()[-1].partition("#")[2]
        before = len(self.links())
        status, _ = self.ask("POST", "/api/session", {"token": token})

        assert status == 200
        until(lambda: len(self.links()) > before)
        return token

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def until(is_so: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def started(home: Path, runs: Path, *arguments: object) -> Ui:
    """Start a page's server and wait for its first link."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(home / "state"), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "mst", "ui", "--runs", str(runs), *map(str, arguments),
         "--audit-log", str(home / "audit")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    made = Ui(process, home, runs)
    assert process.stdout is not None
    for line in process.stdout:
        made.lines.append(line)
        if line.startswith("page "):
            break
    else:
        raise AssertionError("".join(made.lines))
    made.reader = threading.Thread(target=lambda: made.lines.extend(process.stdout or ()))
    made.reader.start()
    return made


def stop_works(home: Path) -> None:
    """End what a test that failed has left running."""
    for each in background.works(home / "state" / "mst" / "work"):
        background.stop(each, kill=True)


@pytest.fixture(scope="module")
def ui(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    home = tmp_path_factory.mktemp("home")
    (home / "runs").mkdir()
    made = started(home, home / "runs", "--models", tiny_model.parent, "--data", chat_rows.parent)
    yield made
    if made.process.poll() is None:
        made.end()
    stop_works(home)


def test_a_run_is_started_watched_stopped_and_resumed_through_the_page(ui: Ui) -> None:
    token = ui.enter()
    choices = ui.ask("GET", "/api/choices")[1]
    request = {
        "name": "wards", "model": choices["models"][0]["id"],
        "dataset": [choices["data"][0]["id"]], "options": ENDLESS,
    }  # fmt: skip
    status, begun = ui.ask("POST", "/api/start", request)
    assert status == 200, begun
    path = f"/api/runs/{begun['run']}"
    until(lambda: ui.ask("GET", path)[1].get("loss"))
    whole = ui.ask("GET", path)[1]
    listed = ui.ask("GET", "/api/runs")[1]["runs"]
    stopped = ui.ask("POST", f"{path}/stop", {})
    until(lambda: ui.ask("GET", path)[1]["state"] == "interrupted")
    steps = rundir.read_metrics(ui.runs / "wards")[-1]["step"]
    resumed = ui.ask("POST", f"{path}/resume", {})
    until(lambda: ui.ask("GET", path)[1]["state"] == "running")
    until(lambda: rundir.read_metrics(ui.runs / "wards")[-1]["step"] > steps)
    again = ui.ask("POST", f"{path}/resume", {})
    ui.ask("POST", f"{path}/stop", {})
    until(lambda: ui.ask("GET", path)[1]["state"] == "interrupted")

    assert (stopped[0], resumed[0], again[0]) == (200, 200, 409)
    assert whole["state"] == "running"
    assert whole["plan"]["reasons"]
    # What it started is sealed by itself, and says so.
    assert whole["seal"]["open"] == []
    assert whole["seal"]["ways"] > 10
    assert [(each["name"], each["state"]) for each in listed] == [("wards", "running")]
    works = ui.ask("GET", "/api/works")[1]["works"]
    assert {each["run"] for each in works} == {begun["run"]}
    output = ui.ask("GET", f"/api/works/{begun['work']}")[1]["output"]
    assert "wards" in output
    # The link's token is in nothing that is kept.
    for each in (ui.home / "audit", ui.home / "state", ui.runs):
        kept = [
            file for file in each.rglob("*") if file.is_file() and file.suffix != ".safetensors"
        ]
        assert kept
        assert not any(token.encode() in file.read_bytes() for file in kept)


def test_a_used_link_a_wrong_one_and_other_sites_stay_out(ui: Ui) -> None:
    token = ui.enter()
    inside = ui.cookie
    cases = [
        ui.ask("POST", "/api/session", {"token": token}, Cookie=""),
        ui.ask("POST", "/api/session", {"token": "x" * 43}, Cookie=""),
        ui.ask("GET", "/api/runs", Cookie=""),
        ui.ask("GET", "/api/runs", Cookie=inside[:-1]),
        ui.ask("GET", "/api/runs", Host="evil.example"),
        ui.ask("GET", "/api/runs", Origin="http://evil.example"),
        ui.ask("POST", "/api/start", {"name": "x"}, Origin="null"),
    ]

    assert [status for status, _ in cases] == [403, 403, 401, 401, 403, 403, 403]
    assert "terminal" in cases[0][1]["error"]["message"]
    assert ui.ask("GET", "/api/runs", Cookie=inside)[0] == 200


def test_the_page_is_sealed_and_logged_and_ends_when_told(ui: Ui) -> None:
    text = "".join(ui.lines)
    listening = subprocess.run(
        ["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True
    ).stdout
    code = ui.end()
    log = "".join(each.read_text() for each in (ui.home / "audit").glob("*.jsonl"))
    events = [json.loads(line)["event"] for line in log.splitlines()]

    assert re.search(r"^seal +.*none open", text, re.M)
    # On loopback alone.
    assert f"0100007F:{ui.port:04X}" in listening
    assert f"00000000:{ui.port:04X}" not in listening
    assert code == 0
    assert {"ui.begun", "jail.entered", "ui.entered"} <= set(events)
    asked = [each["facts"] for each in map(json.loads, log.splitlines())
             if each["event"] == "ui.asked"]  # fmt: skip
    assert [each["do"] for each in asked] == ["start", "stop", "resume", "stop"]
    assert {each["run"] for each in asked} == {"wards"}
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", ui.port))


def test_what_can_not_be_had_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = ["--audit-log", str(tmp_path / "audit")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        codes = [
            main(["ui", *arguments, *audit])
            for arguments in (
                ["--port", str(port)], ["--port", "70000"], ["--runs", str(tmp_path / "none")],
                ["--allow-net", "10.0.0.0/8"],
            )
        ]  # fmt: skip
    told = capsys.readouterr().err

    assert codes == [UsageError.exit_code] * 4
    assert f"127.0.0.1 port {port} is in use" in told
    assert "is no directory" in told
