"""The commands are sealed without being asked, with their workers, plugins and models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mst.cli import main
from mst.errors import EXIT_USAGE
from mst.rundir import SEAL

ENVIRONMENT = {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def mst(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *map(str, words)],
        env={**os.environ, **ENVIRONMENT, **more.pop("environ", {})},
        capture_output=True, text=True, timeout=200, check=False, **more,
    )  # fmt: skip


def training(model: Path, rows: Path, run: Path, **more: object) -> list[str]:
    options = {
        "model": model, "dataset": rows, "output-dir": run, "device": "cpu", "max-steps": 1,
        "per-device-train-batch-size": 2, "gradient-accumulation-steps": 1, "val-size": 4,
        "label-accuracy": "off", "threads": 1, **more,
    }  # fmt: skip
    return ["train", *(text for name, each in options.items() for text in (f"--{name}", str(each)))]


def test_a_run_holds_what_it_was_sealed_by(finished_run: Path) -> None:
    seal = json.loads((finished_run / SEAL).read_text())

    assert seal["layer"] in ("root-namespace", "user-namespace", "given-namespace", "broker",
                             "seccomp")  # fmt: skip
    assert len(seal["ways"]) >= 14
    assert not any(way["open"] for way in seal["ways"])


def test_no_jail_without_a_reason(tmp_path: Path) -> None:
    done = mst("train", "--jail", "off", cwd=tmp_path)

    assert done.returncode == EXIT_USAGE
    assert "--jail-reason" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_several_machines_have_to_be_named(tmp_path: Path) -> None:
    done = mst("train", "--nnodes", 2, "--master-addr", "10.0.0.1", cwd=tmp_path)

    assert done.returncode == EXIT_USAGE
    assert "--allow-net" in done.stderr
    assert "10.0.0.1" in done.stderr


def test_networks_are_repeated_options() -> None:
    from mst.cli.options import Parser, add_train_options, train_request

    parser = Parser()
    add_train_options(parser)
    args = parser.parse_args(["--allow-net", "10.0.0.0/24", "--allow-net", "10.1.0.7"])

    assert train_request(args).allow_net == ("10.0.0.0/24", "10.1.0.7")


def test_the_doctor_says_which_layer_this_machine_gives() -> None:
    done = mst("doctor", "--seal", "--json")
    answer = json.loads(done.stdout)
    plain = mst("doctor", "--seal")

    assert done.returncode == (0 if answer["ok"] else 1)
    assert [each["asked"] for each in answer["asked"]] == ["auto", "namespace", "broker", "seccomp"]
    for each in answer["asked"]:
        assert (each["seal"] is None) == bool(each["fault"])
    if answer["ok"]:
        assert "way out: io_uring: E" in plain.stdout
        assert answer["asked"][0]["seal"]["layer"] in plain.stdout


PLUGIN = """
import json, os, socket, subprocess, sys, urllib.request

def attempt(name, function):
    try:
        function()
        said = "out"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    with open(os.environ["SAID"], "a") as file:
        file.write(json.dumps([name, said]) + "\\n")

place = (os.environ["SINK"], int(os.environ["SINK_PORT"]))

def send(*_, **__):
    socket.create_connection(place, 2).close()

def shell():
    code = "import socket,sys;socket.create_connection((sys.argv[1],int(sys.argv[2])),2)"
    subprocess.run([sys.executable, "-c", code, *map(str, place)], check=True, stderr=-3)

attempt(os.environ.get("MST_TEST_WHO", "plugin"), send)
attempt("child of a plugin", shell)
attempt("image of a row", lambda: urllib.request.urlopen(f"http://{place[0]}:{place[1]}/", None, 2))
"""


def plugin(directory: Path) -> None:
    """Install a package whose only backend talks, as a vendor's would be installed."""
    (directory / "mst_talker.py").write_text(PLUGIN)
    info = directory / "mst_talker-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mst-talker\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mst]\ntalker = mst_talker\n")


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True])
def test_a_plugin_is_inside(
    sealed: bool, tiny_model: Path, chat_rows: Path, tmp_path: Path, outside: dict[str, Any]
) -> None:
    packages, said = tmp_path / "packages", tmp_path / "said"
    packages.mkdir()
    plugin(packages)
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    environ = {
        "PYTHONPATH": path, "SAID": str(said), "SINK": outside["sink"],
        "SINK_PORT": str(outside["port"]),
    }  # fmt: skip
    # `mst plugins` only looks, and is not sealed.
    command = ["plugins"]
    if sealed:
        command = training(tiny_model, chat_rows, tmp_path / "run")
    done = mst(*command, environ=environ, cwd=tmp_path)
    attempts = dict(json.loads(line) for line in said.read_text().splitlines())

    assert done.returncode == 0, done.stdout + done.stderr
    assert set(attempts) == {"plugin", "child of a plugin", "image of a row"}
    assert {each == "out" for each in attempts.values()} == {not sealed}, attempts
    if sealed:
        assert "--allow-net" in attempts["plugin"]


MODEL = """
import json, os, socket
from transformers import PretrainedConfig
class Talker(PretrainedConfig):
    model_type = "talker"
try:
    socket.create_connection((os.environ["SINK"], int(os.environ["SINK_PORT"])), 2).close()
    print("model out")
except OSError as error:
    print("model", type(error).__name__)
"""
LOADER = """
import os, sys
from mst.seal.jail import ladder
from mst.seal.jail.seal import JailRequest, Scene
if sys.argv[1] != "outside":
    ladder.enter(JailRequest(sys.argv[1]), Scene(), os.environ)
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True)
import jinja2
# What a template could do if it got out of the sandbox, and nothing but it.
source = "{{ cycler.__init__.__globals__.os.popen(command).read() }}"
code = "import socket,sys;socket.create_connection((sys.argv[1],int(sys.argv[2])),2);print('out')"
command = f'{sys.executable} -c "{code}" {os.environ["SINK"]} {os.environ["SINK_PORT"]} 2>&1'
said = jinja2.Environment().from_string(source).render(command=command)
print("template", said.splitlines()[-1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["outside", "namespace"])
def test_code_of_a_model_and_of_a_template_stays_inside(
    layer: str, tmp_path: Path, outside: dict[str, Any]
) -> None:
    (tmp_path / "talker.py").write_text(MODEL)
    auto = {"AutoConfig": "talker.Talker"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "talker", "auto_map": auto}))
    environ = {
        **os.environ, "SINK": outside["sink"], "SINK_PORT": str(outside["port"]),
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOADER, layer, str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert [line.endswith(" out") for line in lines] == [layer == "outside"] * 2, lines


@pytest.mark.slow
def test_what_python_starts_is_sealed(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    code = f"""
import os, mst
path, manifest = mst.train(model={str(tiny_model)!r}, dataset={str(chat_rows)!r}, device="cpu",
    max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1, val_size=0,
    label_accuracy="off", nproc_per_node=2, output_dir="run")
print(os.readlink("/proc/self/ns/net"), manifest.status)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **ENVIRONMENT},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    mine = os.readlink("/proc/self/ns/net")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{mine} done"
    seal = json.loads((tmp_path / "run" / SEAL).read_text())
    assert len(seal["ways"]) >= 14


TRACED = "trace=connect,sendto,sendmsg,sendmmsg"
INET = re.compile(r'sa_family=AF_INET6?, .*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)')


def reached(log: str) -> list[str]:
    """Return the calls that succeeded with an inet address that isn't loopback."""
    found = []
    for line in log.splitlines():
        address = INET.search(line)
        answer = re.search(r"\) += (-?\d+)", line)
        good = answer is not None and (int(answer[1]) >= 0 or "EINPROGRESS" in line)
        if address and good and not address[1].startswith(("127.", "::1")):
            found.append(line)
    return found


def traced(log: Path, *command: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["strace", "-f", "-qq", "-e", TRACED, "-o", str(log), sys.executable, *map(str, command)],
        env={**os.environ, **ENVIRONMENT, **environ}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_no_command_reaches_another_machine(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, outside: dict[str, Any]
) -> None:
    if not shutil.which("strace"):
        pytest.skip("wants strace")
    code = "import socket,sys;socket.create_connection((sys.argv[1],int(sys.argv[2])),3)"
    out = traced(tmp_path / "out", "-c", code, outside["sink"], outside["port"])
    if "ptrace" in out.stderr:
        pytest.skip("wants ptrace")
    assert reached((tmp_path / "out").read_text())  # so the test can fail

    run = tmp_path / "run"
    commands: list[list[object]] = [
        [*training(tiny_model, chat_rows, run, **{"nproc-per-node": 2})],
        ["merge", run],
        ["eval", run, "--metric", "loss", "--device", "cpu"],
        ["chat", run, "--prompt", "secret", "--max-new-tokens", 2, "--device", "cpu"],
    ]
    for command in commands:
        log = tmp_path / str(command[0])
        done = traced(log, "-m", "mst", *command)

        assert done.returncode == 0, done.stdout + done.stderr
        assert "connect(" in log.read_text()  # the self-test's own
        assert reached(log.read_text()) == []


def test_a_program_of_python_is_not_sealed_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.readlink("/proc/self/ns/net")

    assert main(["chat", "no-such-model"]) != 0
    assert os.readlink("/proc/self/ns/net") == before
    assert "no-such-model" in capsys.readouterr().err


def test_the_commands_options_are_the_same(take_help: Callable[[str], str]) -> None:
    for command in ("train", "eval", "merge", "chat"):
        for option in ("--jail ", "--jail-reason ", "--allow-net "):
            assert option in take_help(command), command


@pytest.fixture
def take_help(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    def take(command: str) -> str:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        return capsys.readouterr().out

    return take


def test_pickled_weights_are_converted_inside(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    command = [sys.executable, "-m", "mst", "model", "convert", str(pickled)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=100
    )
    listing = subprocess.run(
        [*command[:4], "manifest", str(tmp_path / "out")], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seal ")
    assert "each compared" in done.stdout
    assert "seal " not in listing.stdout
