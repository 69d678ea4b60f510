"""Every command of docs/tutorials runs, in order, and prints what the tutorial shows.

A tutorial's files are the CSV blocks in it, and its model is the tests' tiny one: `train` gets two
steps. Commands that only look run in this process; those that enter the jail in their own.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.docs.test_docs import ROOT

from mst import cli

TUTORIALS = ROOT / "docs" / "tutorials"
NAMES = sorted(path.stem for path in TUTORIALS.glob("*.md") if not path.stem.endswith(".zh-CN"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TINY = "--max-steps 2 --threads 1 --label-accuracy off --device cpu"
SEALED = ("train", "eval", "merge", "chat")


def fences(name: str) -> list[tuple[str, str]]:
    """Return language and text of each fenced block, in order."""
    return FENCE.findall((TUTORIALS / f"{name}.md").read_text(encoding="utf-8"))


def files(name: str) -> dict[str, str]:
    """Return the files that a tutorial tells its reader to save, by the last name before each."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    found = re.finditer(r"^```csv\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return {re.findall(r"`([\w.-]+\.csv)`", text[: each.start()])[-1]: each[1] for each in found}


def commands(block: str) -> list[str]:
    """Return the commands of a shell block; a line that ends with a backslash goes on."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@dataclass
class Shell:
    """Runs commands in a directory as the reader's shell would; `servers` go on beside them."""

    place: Path
    port: int
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, command: str, capsys: pytest.CaptureFixture[str]) -> str:
        """Return what a command has printed."""
        words = shlex.split(command.replace(":8000", f":{self.port}"))
        if words[:2] == ["mst", "serve"]:
            return self.serve([*words[2:], "--port", str(self.port)])
        if words[0] != "mst":
            return self.other(words)
        if words[1] in ("train", "plan") and "--model" not in words:
            words += ["--model", "models/my-model"]
        if words[1] == "train":
            words += TINY.split()
        if words[1] in SEALED:
            return self.other([sys.executable, "-m", *words])
        capsys.readouterr()
        code = cli.main(words[1:])
        printed = "".join(capsys.readouterr())

        assert code == 0, printed
        return printed

    def other(self, words: list[str]) -> str:
        done = subprocess.run(
            words, cwd=self.place, env=os.environ | {"COLUMNS": "200"}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip

        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def serve(self, arguments: list[str]) -> str:
        server = subprocess.Popen(
            [sys.executable, "-m", "mst", "serve", *arguments, "--device", "cpu"], cwd=self.place,
            env=os.environ | {"COLUMNS": "200"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.servers.append(server)
        assert server.stdout is not None
        printed = ""
        for line in server.stdout:
            printed += line
            if line.startswith("ready"):
                break

        assert "ready" in printed, printed
        return printed

    def stop(self) -> list[int]:
        """Return the exit codes of the servers, each asked to end."""
        for each in self.servers:
            each.send_signal(signal.SIGTERM)
        for each in self.servers:
            each.communicate(timeout=60)
        return [each.returncode for each in self.servers]


def shows(printed: str, line: str) -> bool:
    """Tell whether a line was printed; `…` stands for anything, and lines may be broken."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in line.split("…")]
    return re.search(r".*?".join(parts), printed, re.DOTALL) is not None


@pytest.fixture
def shell(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "my-model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Shell(tmp_path, port)
    yield made
    for each in made.servers:
        if each.poll() is None:
            each.kill()
            each.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_tutorials_commands_run_and_print_what_it_shows(
    name: str, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, text in files(name).items():
        (shell.place / file).write_text(text, encoding="utf-8")
    printed = ""
    for language, block in fences(name):
        if language == "bash":
            printed = "".join(shell.run(each, capsys) for each in commands(block))
        if language == "text":
            missing = [line for line in block.splitlines() if not shows(printed, line)]

            assert missing == [], printed

    assert shell.stop() == [0] * len(shell.servers)


def test_a_line_that_was_not_printed_is_missed() -> None:
    assert shows("wrote   a.csv.mst: 12\nbytes", "wrote …mst: 12 bytes")
    assert not shows("wrote   a.csv.mst: 13\nbytes", "wrote …mst: 12 bytes")
