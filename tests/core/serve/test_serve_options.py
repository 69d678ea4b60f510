"""What `mst serve` refuses before it begins, and what it makes of its options."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.core.serve.test_listening import certificate

import mst.probe
from mst import serial
from mst.cli import main
from mst.cli.serve import _access, add_arguments
from mst.errors import UsageError
from mst.serve import api_keys
from mst.serve.http.job import ServeJob, What, prepare
from mst.serve.http.limits import Limits
from mst.serve.http.listening import Access, Place
from mst.serve.job import default_batch

TLS = ("--tls-cert", "c.pem", "--tls-key", "k.pem")


@pytest.fixture
def no_keys(tmp_path: Path) -> tuple[str, str]:
    return "--keys-file", str(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "heard beyond this machine"),
        (("--host", "::"), "heard beyond this machine"),
        (("--host", "0.0.0.0", "--api-keys", "off", *TLS), "let anybody ask"),
        (("--host", "192.0.2.1"), "no address|can't be listened"),
        (("--tls-cert", "c.pem"), "go together"),
        (("--tls-client-ca", "c.pem"), "goes with --tls-cert"),
        (TLS, "c.pem is not there"),
        (("--port", "70000"), "from 0 to 65535"),
        (("--max-tokens", "0"), "above 0"),
        (("--header-seconds", "nan"), "above 0"),
        (("--grace-seconds", "-1"), "0 or more"),
        (("--body-size", "many"), "--body-size"),
        (("--prefix-cache", "many"), "--prefix-cache"),
        (("--batch", "0"), "at least 1"),
        (("--allow-net", "10.0.0.0/8"), "asks nobody"),
        (("--api-keys", "require"), "has none"),
        (("--portt", "1"), "Did you mean --port"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: tuple[str, ...],
    words: str,
    no_keys: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = list(options)
    if "--host" in options and "192.0.2.1" in options:
        api_keys.add(tmp_path / "keys.json", "x")
        given += ["--keys-file", str(tmp_path / "keys.json")]
        made = certificate(tmp_path)
        given += ["--tls-cert", str(made[0]), "--tls-key", str(made[1])]
    elif "require" in options:
        given += no_keys
    code = main(["serve", "--port", "0", *given])
    shown = capsys.readouterr().err

    assert code == 2
    assert any(each in shown for each in words.split("|")), shown


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(options)


def test_keys_are_asked_for_beyond_loopback_and_where_they_are_named(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    api_keys.add(keys, "ward")
    file = ("--keys-file", str(keys))

    assert _access(parsed(), Place()).keys_file is None
    assert _access(parsed("--api-keys", "off", *file), Place()).keys_file is None
    assert _access(parsed(*file), Place()).keys_file == str(keys)
    beyond = _access(parsed("--host", "LLM.example", *TLS, *file), Place("LLM.example"))

    assert beyond.keys_file == str(keys)
    assert beyond.any_address
    assert "llm.example" in beyond.hosts
    assert not _access(parsed(), Place("127.1.2.3")).any_address
    with pytest.raises(UsageError, match="mst apikeys add"):
        _access(parsed("--keys-file", str(tmp_path / "none")), Place())


def test_a_port_or_path_that_is_taken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as other:
        code = main(["serve", "--port", str(other.getsockname()[1])])

    assert code == 2
    assert "in use by another program" in capsys.readouterr().err
    assert main(["serve", "--socket", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main(["serve", "--socket", str(tmp_path / ("x" * 120))]) == 2
    assert "longer than the 107 bytes" in capsys.readouterr().err


def test_a_missing_package_is_said_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mst.serve.packages.PACKAGES", ("uvicorn", "not_here"))

    assert main(["serve"]) == 1
    assert "needs not_here" in (shown := capsys.readouterr().err)
    assert "python -m pip install 'mst-train[serve]'" in shown


def job_of(what: What) -> ServeJob:
    return prepare(what, "cpu", Limits(), Access(("localhost",)), {})


def test_an_artefact_that_has_failed_is_served_by_force_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    from mst.errors import ModelError

    path = shutil.copytree(tiny_model, tmp_path / "artefact")
    manifest: dict[str, Any] = {"format": "merged", "status": "failed", "faults": ["it is wrong"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"it is wrong.*--force"):
        job_of(What(str(path)))

    assert job_of(What(str(path), force=True)).name == "artefact"
    (path / "manifest.json").write_text(json.dumps(manifest | {"status": "passed"}))
    assert job_of(What(str(path))).name == "artefact"


def test_the_command_says_what_it_needs_where_the_extra_is_not_installed() -> None:
    code = (
        "import sys\n"
        "for name in ('h11', 'uvicorn', 'pydantic', 'llguidance'): sys.modules[name] = None\n"
        "from mst.cli import main; sys.exit(main(['serve', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "mst serve needs uvicorn, pydantic, llguidance, not here" in done.stderr


def test_an_artefact_for_another_engine_names_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mst.errors import PlanError

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = shutil.copytree(tiny_model, tmp_path / "artefact")
    (path / "manifest.json").write_text(json.dumps({"format": "gptq", "status": "passed"}))
    config = json.loads((path / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (path / "config.json").write_text(json.dumps(quantized))

    with pytest.raises(PlanError) as caught:
        job_of(What(str(path)))
    with pytest.raises(PlanError, match=r"(?s)--engine vllm can't serve.*-m venv"):
        job_of(What(str(path), engine="vllm"))

    text = str(caught.value)
    assert f"no engine here serves {path} (gptq) on cpu" in text
    assert f"vllm: vLLM is not in {tmp_path / 'data' / 'mst' / 'engines' / 'vllm-cpu'}" in text
    assert "lmdeploy: it computes with gptq weights on cuda, not on cpu" in text


def test_a_whole_model_is_served_by_the_builtin_engine_and_says_why(tiny_model: Path) -> None:
    job = job_of(What(str(tiny_model)))

    assert job.external is None
    assert job.reason is not None
    assert (job.reason.value, job.reason.why) == ("builtin", "merged weights")


@pytest.mark.parametrize(
    ("device", "threads", "batch", "why"),
    [
        ("cpu", 1, "8", "4, and 4 for each of 1 core"),
        ("cpu", 2, "12", "4, and 4 for each of 2 cores"),
        ("cpu", 64, "32", "4, and 4 for each of 64 cores, but 32 at most"),
        ("cuda:0", 2, "32", "the default"),
    ],
)
def test_on_a_cpu_the_cores_say_how_many_answers_are_computed_at_once(
    device: str, threads: int, batch: str, why: str
) -> None:
    found = default_batch(device, threads)

    assert (found.value, found.why) == (batch, why)


def test_how_many_answers_are_computed_at_once_is_the_users_to_say(tiny_model: Path) -> None:
    own = job_of(What(str(tiny_model))).engine

    assert own.batch == int(default_batch("cpu", own.threads).value)
    assert job_of(What(str(tiny_model), batch=5)).engine.batch == 5


LOADED = """
import sys
import mst.cli, mst.cli.serve
print([name for name in ("mst.serve.http.job", "mst.chat", "asyncio") if name in sys.modules])
"""


def test_what_waits_beside_the_model_loads_nothing_of_it() -> None:
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.parametrize("engine", ["auto", "builtin"])
def test_the_machine_is_looked_at_once(
    engine: str, tiny_model: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer = mst.probe._report

    def counted(registry: Any, name: str, seconds: float) -> Any:
        asked.append(name)
        return answer(registry, name, seconds)

    monkeypatch.setattr(mst.probe, "_report", counted)
    job_of(What(str(tiny_model), adapters=(f"x={finished_run}",), engine=engine))

    assert "cpu" in asked
    assert len(asked) == len(set(asked))


def test_a_job_survives_json_and_has_the_runs_name(finished_run: Path) -> None:
    job = job_of(What(str(finished_run), context=100, batch=3, prefix_bytes=0))

    assert serial.loads(ServeJob, serial.dumps(job)) == job
    assert job.name == finished_run.name
    assert job.engine.model.adapter is not None
    assert (job.engine.context, job.engine.batch, job.engine.prefix_bytes) == (100, 3, 0)
    assert job_of(What(str(finished_run), name="ward")).name == "ward"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"adapters": ("a",)}, "NAME=PATH"),
        ({"adapters": ("=x",)}, "NAME=PATH"),
        ({"adapters": ("a=/nowhere", "a=/nowhere")}, "two adapters would be called a"),
        ({"adapters": ("a=/nowhere",)}, "neither a run nor"),
        ({"context": 513}, "from 2 to 512"),
        ({"context": 1}, "from 2 to 512"),
    ],
)
def test_wrong_targets_are_refused(tiny_model: Path, what: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        job_of(What(str(tiny_model), **what))


def test_an_adapter_is_not_called_as_its_base(tiny_model: Path, finished_run: Path) -> None:
    adapters = (f"x={finished_run}",)

    assert list(job_of(What(str(tiny_model), adapters=adapters)).engine.adapters) == ["x"]
    with pytest.raises(UsageError, match="would both be called x"):
        job_of(What(str(tiny_model), name="x", adapters=adapters))
