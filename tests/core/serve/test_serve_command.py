"""`mst serve` as it is run: in its jail, over real sockets, with clients as they are."""

from __future__ import annotations

import json
import os
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

import pexpect
import psutil
import pytest

from mst.serve import api_keys

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "my card is late"}]
SECRET = "patient-4711"
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": ["Rome", "Oslo"]}},
    "required": ["town"],
    "additionalProperties": False,
}


@dataclass
class Server:
    """A server that runs.

    Attributes:
        process: of the command.
        port: on 127.0.0.1; 0 for a unix socket.
        path: of the unix socket; "" for a port.
        audit: directory of its audit log.
        lines: that it has printed.
        reader: of what it prints.
    """

    process: subprocess.Popen[str]
    port: int
    path: str
    audit: Path
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread = field(default_factory=threading.Thread)

    def connect(self) -> socket.socket:
        if self.path:
            made = socket.socket(socket.AF_UNIX)
            made.connect(self.path)
        else:
            made = socket.create_connection(("127.0.0.1", self.port))
        made.settimeout(60)
        return made

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> socket.socket:
        """Send a request and return the connection."""
        given = {"Host": "localhost", "Content-Length": str(len(body))}
        if body:
            given["Content-Type"] = "application/json"
        lines = [f"{name}: {value}" for name, value in (given | headers).items()]
        made = self.connect()
        made.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body)
        return made

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        """Return the status and the text of an answer."""
        raw = b"" if body is None else json.dumps(body).encode()
        return answer(self.send(method, path, raw, **{"Connection": "close"} | headers))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def figure(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[1].splitlines()
        return next(float(each.split()[-1]) for each in lines if each.startswith(name + " "))


def answer(made: socket.socket) -> tuple[int, str]:
    with made:
        whole = made.makefile("rb").read().decode()
    head, _, body = whole.partition("\r\n\r\n")
    return int(head.split()[1]), body


def begun(made: socket.socket) -> None:
    """Wait until an answer has begun to come."""
    got = b""
    while b"data: " not in got:
        block = made.recv(1 << 16)
        assert block
        got += block


def started(home: Path, *arguments: object) -> Server:
    """Start a server and wait until it is ready."""
    audit = home / "audit"
    process = subprocess.Popen(
        [sys.executable, "-m", "mst", "serve", *map(str, arguments), "--device", "cpu",
         "--audit-log", str(audit)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    server = Server(process, 0, "", audit)
    assert process.stdout is not None
    for line in process.stdout:
        server.lines.append(line)
        where = line.partition(" at ")[2].strip()
        if line.startswith("serve ") and where.startswith("unix:"):
            server.path = where.removeprefix("unix:")
        elif line.startswith("serve "):
            server.port = int(where.partition("://")[2].partition("/")[0].rpartition(":")[2])
        if line.startswith("ready "):
            break
    else:
        raise AssertionError("".join(server.lines))
    server.reader = threading.Thread(target=lambda: server.lines.extend(process.stdout or ()))
    server.reader.start()
    return server


@pytest.fixture(scope="module")
def endless_model(tiny_model_with_context: Callable[[int], Path]) -> Path:
    """The tiny model, which reads so much that its answers are long."""
    return tiny_model_with_context(20_000)


@pytest.fixture(scope="module")
def server(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = started(
        tmp_path_factory.mktemp("home"), endless_model, "--port", 0, "--max-tokens", 15_000,
        "--header-seconds", 1, "--body-seconds", 1, "--grace-seconds", 20,
    )  # fmt: skip
    yield made
    made.end()


def body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0} | more


def test_it_runs_in_a_jail_that_leads_nowhere(server: Server) -> None:
    seal = next(each for each in server.lines if each.startswith("seal "))

    assert "none open" in seal
    assert server.ask("GET", "/ready") == (200, '{"status":"ok"}')


def test_openais_own_client_chats(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    with client:
        whole = client.chat.completions.create(**body())
        pieces = list(
            client.chat.completions.create(
                **body(), stream=True, stream_options={"include_usage": True}
            )
        )
        tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
        forced = {"type": "function", "function": {"name": "weather"}}
        called = client.chat.completions.create(
            **body(max_tokens=300), tools=[tool], tool_choice=forced
        )
        wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
        held = client.chat.completions.create(**body(max_tokens=300), response_format=wanted)
        plain = client.completions.create(model="tiny", prompt="my card", max_tokens=3, logprobs=1)
        vectors = client.embeddings.create(model="tiny", input=["a", "b"])
        models = client.models.list()
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**body(model="gpt-4"))
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(**body(temperature=9))

    text = whole.choices[0].message.content
    assert text
    assert "".join(each.choices[0].delta.content or "" for each in pieces if each.choices) == text
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens == 6
    call = called.choices[0].message.tool_calls[0]
    assert called.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["town"] in ("Rome", "Oslo")
    assert json.loads(held.choices[0].message.content)["town"] in ("Rome", "Oslo")
    assert len(plain.choices[0].logprobs.tokens) == 3
    assert [len(each.embedding) for each in vectors.data] == [64, 64]
    assert [each.id for each in models.data] == ["tiny"]
    assert unknown.value.code == "model_not_found"
    assert wrong.value.param == "temperature"


def test_many_callers_are_answered_at_once(server: Server) -> None:
    expected = server.ask("POST", CHAT, body(max_tokens=40))[1]
    answers: list[str] = []

    def one() -> None:
        answers.append(server.ask("POST", CHAT, body(max_tokens=40))[1])

    threads = [threading.Thread(target=one) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    def text(answer: str) -> str:
        return str(json.loads(answer)["choices"][0]["message"]["content"])

    assert {text(each) for each in answers} == {text(expected)}
    assert len(answers) == 8


def test_other_hosts_and_pages_are_refused(server: Server) -> None:
    assert server.ask("GET", "/v1/models", Host="evil.example")[0] == 403
    assert server.ask("POST", CHAT, body(), Origin="http://evil.example")[0] == 403
    assert server.ask("GET", "/v1/models", Host=f"127.0.0.1:{server.port}")[0] == 200


def test_a_large_body_is_refused_before_it_is_read(server: Server) -> None:
    size = 100 << 20
    began = time.monotonic()
    made = server.connect()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {size}\r\n\r\n"
    )
    made.sendall(head.encode())
    sent, block = 0, b"x" * (1 << 20)
    with made:
        try:
            while sent < size:
                made.sendall(block)
                sent += len(block)
        except OSError:
            pass
        status = made.recv(1000).split()[1]

    assert status == b"413"
    assert time.monotonic() - began < 30


def test_a_slow_head_and_a_slow_body_are_not_waited_for(server: Server) -> None:
    with server.connect() as head, server.connect() as after:
        after.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert after.recv(1000).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        for made in (head, after):
            made.sendall(b"GET /health HTTP/1.1\r\nHo")
        for made in (head, after):
            while made.recv(1000):
                pass
        assert 0.5 < time.monotonic() - began < 30
    slow = server.send("POST", CHAT, b'{"model":', **{"Content-Length": "1000"})
    status, text = answer(slow)

    assert (status, "did not come whole" in text) == (408, True)
    assert server.ask("POST", CHAT, body())[0] == 200


def test_what_is_no_http_is_refused(server: Server) -> None:
    with server.connect() as made:
        made.sendall(b"\x16\x03\x01\x00 nothing of the kind\r\n\r\n")
        assert made.makefile("rb").read().startswith(b"HTTP/1.1 400")
    with server.connect() as made:
        made.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000)
        assert b"200" not in made.makefile("rb").read(20)
    assert server.ask("GET", "/health")[0] == 200


def test_a_client_that_goes_away_frees_the_engine(server: Server) -> None:
    before = server.figure("mst_engine_cancelled_total")
    raw = json.dumps(body(max_tokens=15_000, stream=True)).encode()
    made = server.send("POST", CHAT, raw)
    begun(made)
    made.close()
    deadline = time.monotonic() + 60
    while server.figure("mst_engine_cancelled_total") == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)

    assert server.figure("mst_engine_running") == 0
    assert server.figure("mst_callers_gone_total") >= 1


def test_nothing_of_a_prompt_is_printed(server: Server) -> None:
    server.ask("POST", CHAT, body(messages=[{"role": "user", "content": SECRET}]))
    server.ask("POST", CHAT, body(messages=[{"role": SECRET, "content": SECRET}]))
    server.ask("GET", f"/{SECRET}?{SECRET}")
    time.sleep(0.2)
    text = "".join(server.lines)

    assert f"POST {CHAT} 200 prompt=" in text
    assert f"POST {CHAT} 400" in text
    assert SECRET not in text


def chat(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `mst chat`."""
    return subprocess.run(
        [sys.executable, "-m", "mst", "chat", *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_mst_chat_talks_to_a_running_server(server: Server, tmp_path: Path) -> None:
    where = f"http://127.0.0.1:{server.port}"
    text = json.loads(server.ask("POST", CHAT, body())[1])["choices"][0]["message"]["content"]
    log = ("--audit-log", tmp_path)
    said = ("--prompt", HELLO[0]["content"], "--max-new-tokens", 6, *log)
    once = chat("--server", where, *said)
    named = chat("tiny", "--server", f"{where}/v1/", *said)
    unknown = chat("other", "--server", where, *said)
    long = chat("--server", where, "--prompt", f"{SECRET} " * 8_000, *log)
    terminal = pexpect.spawn(
        sys.executable, ["-m", "mst", "chat", "--server", where, "--temperature", "1",
                         "--max-new-tokens", "15000", *map(str, log)],
        env=os.environ | {"TERM": "dumb"}, encoding="utf-8", codec_errors="replace", timeout=60,
        dimensions=(24, 200),
    )  # fmt: skip
    terminal.expect(f"seal    no jail: it asks {where}/v1 alone")
    terminal.expect(f"tiny, at {where}/v1.*Ctrl-D leaves")
    terminal.expect("> ")
    terminal.sendline("hello")
    terminal.expect("hello\r\n")
    terminal.expect(r"\S")
    terminal.sendintr()
    terminal.expect(r" \[stopped\]\r\n")
    terminal.expect("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()

    assert (once.stdout, once.stderr, once.returncode) == (text + "\n", "", 0)
    assert named.stdout == once.stdout
    assert unknown.returncode == 1
    assert "does not have the model other (found: tiny)" in unknown.stderr
    assert "maximum context length is 20000" in long.stderr
    assert SECRET not in long.stderr
    assert terminal.exitstatus == 0
    deadline = time.monotonic() + 60
    while server.figure("mst_engine_running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    events = "".join(each.read_text() for each in tmp_path.glob("*.jsonl"))
    assert f'"server":"{where}/v1"' in events.replace(": ", ":")
    assert HELLO[0]["content"] not in events


def test_mst_chat_says_why_no_server_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shut = chat("--server", f"http://127.0.0.1:{port}", "--prompt", SECRET)
    gone = chat("--server", tmp_path / "none.sock", "--prompt", SECRET)
    open_wide = chat("--server", "http://192.0.2.1:8000", "--prompt", SECRET)
    no_place = chat("--server", "ftp://127.0.0.1", "--prompt", SECRET)
    both = chat("--server", f"http://127.0.0.1:{port}", "--checkpoint", "best")
    alone = chat("--api-key-file", tmp_path / "key")
    jailed = chat("--server", f"http://127.0.0.1:{port}", "--jail", "seccomp")

    assert "no server answers at" in shut.stderr
    assert "Connection refused" in shut.stderr
    assert f"no server answers at unix:{tmp_path}/none.sock" in gone.stderr
    assert "for all to read" in open_wide.stderr
    assert "--server takes" in no_place.stderr
    assert "--checkpoint is of a model that is loaded here" in both.stderr
    assert "goes with --server" in alone.stderr
    assert "--jail seccomp would keep" in jailed.stderr
    assert [each.returncode for each in (shut, gone, open_wide, no_place, both, alone, jailed)] == [
        1, 1, 2, 2, 2, 2, 2,
    ]  # fmt: skip
    assert SECRET not in shut.stderr + gone.stderr + open_wide.stderr + no_place.stderr


def test_sigterm_while_the_model_loads_ends_it_well(endless_model: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mst", "serve", str(endless_model), "--device", "cpu", "--port", "0",
         "--audit-log", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("serve "):
            break
    process.send_signal(signal.SIGTERM)
    with process.stdout:
        lines.append(process.stdout.read())

    assert process.wait(60) == 0
    assert "ready" not in "".join(lines)
    assert "Traceback" not in "".join(lines)


def test_sigterm_finishes_what_is_under_way(server: Server) -> None:
    """The last of this server: it ends here."""
    raw = json.dumps(body(max_tokens=300, stream=True)).encode()
    made = server.send("POST", CHAT, raw)
    begun(made)
    server.process.send_signal(signal.SIGTERM)
    with made:
        rest = made.makefile("rb").read()
    code = server.process.wait(60)

    assert b"data: [DONE]" in rest
    assert code == 0
    with pytest.raises(OSError, match="refused"):
        server.connect()
    events = [json.loads(line) for each in sorted(server.audit.glob("*.jsonl"))
              for line in each.read_text().splitlines()]  # fmt: skip
    facts = {each["event"]: each["facts"] for each in events}
    assert facts["serve.begun"]["name"] == "tiny"
    assert facts["serve.ended"]["requests"] > 10
    assert facts["jail.entered"]["layer"] != "off"
    assert SECRET not in json.dumps(events)


def test_a_socket_of_ones_own_with_keys_and_an_adapter(finished_run: Path, tmp_path: Path) -> None:
    """The other way in, which also ends in the middle of an answer that takes too long."""
    keys = tmp_path / "keys.json"
    key = api_keys.add(keys, "ward")
    path = Path("/tmp") / f"mst-test-{os.getpid()}.sock"
    plan = json.loads((finished_run / "run.json").read_text())
    server = started(
        tmp_path, plan["model_path"], "--socket", path, "--keys-file", keys,
        "--served-name", "base", "--adapter", f"ward={finished_run}", "--grace-seconds", 0,
    )  # fmt: skip
    try:
        mode = path.stat().st_mode & 0o777
        right = {"Authorization": f"Bearer {key}", "Host": "anything"}
        listed = json.loads(server.ask("GET", "/v1/models", **right)[1])
        refused = server.ask("GET", "/v1/models")[0]
        mine, other = tmp_path / "mine", tmp_path / "other"
        for file, text in ((mine, key), (other, "mst-wrong")):
            file.write_text(text + "\n")
            file.chmod(0o600)
        said = ("ward", "--server", path, "--prompt", "my card", "--max-new-tokens", 4)
        talks = [chat(*said), *(chat(*said, "--api-key-file", each) for each in (other, mine))]
        texts = [
            json.loads(server.ask("POST", CHAT, body(model=name), **right)[1])["choices"][0]
            for name in ("base", "ward")
        ]
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
    finally:
        server.end()

    assert mode == 0o600
    assert [each["id"] for each in listed["data"]] == ["base", "ward"]
    assert refused == 401
    assert "asks for an API key" in talks[0].stderr
    assert "does not know the key" in talks[1].stderr
    assert (talks[2].returncode, talks[2].stderr) == (0, "")
    assert texts[0] != texts[1]
    assert code == 0
    assert not path.exists()
    log = "".join(each.read_text() for each in server.audit.glob("*.jsonl"))
    used = next(json.loads(line) for line in log.splitlines() if '"serve.key"' in line)
    assert used["facts"]["key"] == "ward"
    assert used["facts"]["requests"] == 5
    assert used["facts"]["completion_tokens"] > 0
    assert key not in log + "".join(server.lines)


def test_a_killed_worker_is_told_of_and_nothing_is_left_running(
    endless_model: Path, tmp_path: Path
) -> None:
    server = started(tmp_path, endless_model, "--port", 0, "--served-name", "tiny")
    try:
        made = server.send("POST", CHAT, json.dumps(body(max_tokens=300, stream=True)).encode())
        begun(made)
        below = psutil.Process(server.process.pid).children(recursive=True)
        worker = next(each for each in below if "mst.serve.http.worker" in each.cmdline())
        worker.kill()
        with made:
            rest = made.makefile("rb").read()
        code = server.process.wait(30)
        server.reader.join(30)
        _, left = psutil.wait_procs(below, timeout=30)
    finally:
        server.end()

    assert b"[DONE]" not in rest
    assert code == 1
    assert "the worker was killed (SIGKILL)" in server.lines[-1]
    assert not left
    with pytest.raises(OSError, match="refused"):
        server.connect()
