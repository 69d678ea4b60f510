"""Attacks that worked on other trainers, each in its real shape: the marker never appears."""

from __future__ import annotations

import ast
import contextlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mst import cli
from mst.errors import DataError, MstError
from mst.model.files import read_header

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[4]
# Files that trainers have unpickled: LLaMA-Factory's value head (CVE-2025-53002), transformers'
# random states and arguments (CVE-2026-1839), ms-swift's cached index (CVE-2025-50472).
UNPICKLED_ELSEWHERE = (
    "value_head.bin", "vhead.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "rng_state_0.pth", "training_args.bin", "trainer_state.pt", "random_states_0.pkl",
    "adapter_model.bin", "pytorch_model.bin", "index.mdl", "tokenizer.pkl", "added_tokens.pickle",
)  # fmt: skip


class Attack:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def lay_pickles(directory: Path, marker: Path) -> None:
    for name in UNPICKLED_ELSEWHERE:
        (directory / name).write_bytes(pickle.dumps(Attack(marker)))


def floor_of(name: str) -> Version:
    """Return the lowest version of a library that mst installs with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = next(r for r in map(Requirement, project["dependencies"]) if r.name == name)
    return next(Version(each.version) for each in found.specifier if each.operator == ">=")


def test_cve_2025_32434_torch_is_new_enough_for_weights_only() -> None:
    import torch

    assert floor_of("torch") >= Version("2.6")
    assert Version(torch.__version__) >= Version("2.6")


def test_cve_2026_4372_transformers_is_new_enough_and_the_field_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other shapes of it are in test_model_files.py."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["_attn_implementation_internal"] = "attacker/kernel"
    (model / "config.json").write_text(json.dumps(config))

    assert floor_of("transformers") >= Version("5.3")
    assert cli.main(["chat", str(model), "--prompt", "hi"]) == 1
    assert "_attn_implementation_internal" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["plan"], ["preview"], ["config", "import"]])
@pytest.mark.parametrize(
    "text",
    [
        'model: !!python/object/apply:os.system ["touch {marker}"]',
        'model: !!python/object/new:os.system ["touch {marker}"]',
        "model: !!python/name:os.system",
        "!!python/object/apply:subprocess.check_output [[touch, {marker}]]",
        "dataset: [!!python/object/apply:eval [\"open('{marker}', 'w')\"]]",
    ],
)
def test_cve_2025_50460_yaml_makes_no_object(
    command: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    marker, path = tmp_path / "marker", tmp_path / "options.yaml"
    path.write_text(text.replace("{marker}", str(marker)) + "\nmax_steps: 1\n")
    more = ["--no-text"] if command == ["preview"] else []  # text needs a terminal
    code = cli.main([*command, str(path), *more])

    assert code == 2
    assert "is not YAML" in capsys.readouterr().err
    assert not marker.exists()
    if "name:" not in text and text.startswith("model"):  # it works where nobody is careful
        with contextlib.suppress(Exception):
            yaml.load(path.read_text(), yaml.UnsafeLoader)

        assert marker.exists()


@pytest.mark.parametrize("command", [["train"], ["config", "import"]])
def test_a_yaml_bomb_is_refused_at_once(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    laughs = ["a0: &a0 [lol]"]
    laughs += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    bombs = ("\n".join([*laughs, "dataset: *a29"]), "dataset: " + "[" * 20_000,
             "x: " + "y" * (2 << 20))  # fmt: skip
    for each in bombs:
        path = tmp_path / "options.yaml"
        path.write_text(each)

        assert cli.main([*command, str(path)]) == 2
        assert len(capsys.readouterr().err) < 500


def _trusts_code(call: ast.Call) -> bool:
    """Return whether a call of `Auto….from_pretrained` or `from_config` leaves the choice open."""
    name = call.func
    if not isinstance(name, ast.Attribute) or name.attr not in ("from_pretrained", "from_config"):
        return False
    of = name.value
    if not isinstance(of, ast.Name) or not of.id.startswith("Auto"):
        return False
    given = [each.value for each in call.keywords if each.arg == "trust_remote_code"]
    return not any(isinstance(each, ast.Constant) and each.value is False for each in given)


def test_no_source_of_ours_loads_what_can_run() -> None:
    """A grep, so that a new call is noticed; the runs below say that the old ones hold."""
    unsafe = re.compile(
        r"yaml\.(unsafe_load|full_load|load)\(|UnsafeLoader|FullLoader|\bpickle\.loads?\(|"
        r"\bjoblib\b|\bdill\b|\bmarshal\.|allow_pickle\s*=\s*True|weights_only\s*=\s*False|"
        r"trust_remote_code\s*=\s*True|[\"']trust_remote_code[\"']:\s*True|shell\s*=\s*True|"
        r"os\.system\(|os\.popen\(|\.extractall\(|shutil\.unpack_archive\("
    )
    found = []
    for folder in ("core", "backends", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            found += [f"{path}: {each[0]}" for each in unsafe.finditer(text)]
            for call in re.finditer(r"torch\.load\((.*)", text):
                if "weights_only=True" not in call[0]:
                    found.append(f"{path}: {call[0]}")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and _trusts_code(node):
                    found.append(f"{path}, line {node.lineno}: trust_remote_code is not False")

    assert found == []


@pytest.mark.parametrize(
    "suffix", [".pkl", ".pt", ".bin", ".npy", ".mdl", ".tar", ".zip", ".jsonl"]
)
def test_cve_2025_50472_a_pickled_data_set_is_refused(tmp_path: Path, suffix: str) -> None:
    from mst.data.formats import read

    path = tmp_path / f"rows{suffix}"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "marker")))
    with pytest.raises(DataError):
        read([str(path)])

    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".zip", ".tar"])
def test_an_archive_of_data_writes_nothing_anywhere(tmp_path: Path, suffix: str) -> None:
    import io
    import tarfile
    import zipfile

    from mst.data.formats import read

    path = tmp_path / "in" / f"rows{suffix}"
    path.parent.mkdir()
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../escaped.jsonl", '{"text": "x"}\n')
    else:
        with tarfile.open(path, "w:gz" if "g" in suffix else "w") as tar:
            member = tarfile.TarInfo("../escaped.jsonl")
            member.size = 14
            tar.addfile(member, io.BytesIO(b'{"text": "x"}\n'))
    with pytest.raises(DataError):
        read([str(path)])

    assert [each.name for each in tmp_path.rglob("*") if each.is_file()] == [path.name]


@contextlib.contextmanager
def counting_server() -> Iterator[tuple[int, list[str]]]:
    """A server on loopback that notes what it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_ssrf_no_url_in_a_row_a_path_or_a_model_is_fetched(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mst.data.formats import read
    from mst.model.locate import locate

    monkeypatch.chdir(tmp_path)
    with counting_server() as (port, asked):
        host = f"127.0.0.1:{port}"
        urls = [f"http://{host}/a.png", f" HTTP://{host}/b.png", f"//{host}/c.png",
                f"https://{host}/d.png", f"ftp://{host}/e.png", f"\\\\{host}\\f.png",
                f"file://{host}/g.png", f"hf://{host}/h.png"]  # fmt: skip
        for url in urls:
            shown = {"type": "image_url", "image_url": {"url": url}}
            answer = {"role": "assistant", "content": "x"}
            rows = (
                {"messages": [{"role": "user", "content": [shown]}, answer]},
                {"messages": [{"role": "user", "content": "<image>a"}, answer], "images": [url]},
            )
            for row in rows:
                (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
                with pytest.raises(MstError):
                    read(["rows.jsonl"])
            with pytest.raises(MstError):
                read([url])
            with pytest.raises(MstError):
                locate(url, (), {"HOME": str(tmp_path)})

        assert asked == []


def read_only_prefix(directory: Path) -> list[str]:
    """Return words that run a command with a directory mounted read-only, if possible."""
    given = shutil.which("unshare")
    if given is None:
        return []
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" "$0" && exec "$@"'
    for options in (["-m"], ["-r", "-m"]):
        prefix = [given, *options, "sh", "-c", script, str(directory)]
        probe = [*prefix, "sh", "-c", f"! touch '{directory}/probe' 2>/dev/null"]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return prefix
    return []


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(each.relative_to(directory)): (each.stat().st_size, each.stat().st_mtime_ns)
        for each in [directory, *directory.rglob("*")]
    }


# Python runs this at start-up, in the command and in every worker that it starts.
WATCH = """
import os, sys
def watch(event, args):
    if event in ("os.system", "pickle.find_class"):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{event} {args!r}\\n")
sys.addaudithook(watch)
"""


@pytest.mark.slow
def test_a_hostile_model_and_a_hostile_directory_run_nothing(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    """CVE-2024-52803 (a shell in the output directory's name), CVE-2025-53002 and -50472 (pickles
    beside weights and in checkpoints) and code that comes with a model, through every command;
    and the model is on a read-only mount, beside which nothing is written.
    """
    marker = tmp_path / "marker"
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    lay_pickles(model, marker)
    code = f"open({str(marker)!r}, 'w').close()\nclass X: pass\n"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "processing_x", "generate"):
        (model / f"{name}.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    for file, kinds in (
        (
            "config.json",
            {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"},
        ),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.X", None]}),
        ("generation_config.json", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("processor_config.json", {"AutoProcessor": "processing_x.X"}),
    ):
        path = model / file
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | {"auto_map": kinds}))
    for each in [*model.rglob("*"), model]:
        each.chmod(0o555 if each.is_dir() else 0o444)
    before = snapshot(model)
    name = "run; touch marker; $(touch marker) `touch marker` & touch marker |\n touch marker '\""
    run = tmp_path / name
    watched = tmp_path / "watched"
    prefix = read_only_prefix(model)

    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "WATCHED": str(watched),
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    careless = f"import pickle; pickle.load(open({str(model / 'optimizer.pt')!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", careless], env=environment, check=True)
    assert "os.system" in watched.read_text()  # the watch and the attack work
    assert marker.exists()
    marker.unlink()
    watched.unlink()

    def mst(*arguments: object) -> str:
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "mst", *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    asked = ("--model", model, "--dataset", chat_rows, "--device", "cpu", "--threads", "1")
    mst("preview", *asked, "--rows", "1", "--no-text")
    steps = ("--max-steps", "1", "--val-size", "4", "--label-accuracy", "off")
    said = mst("train", *asked, *steps, "--output-dir", run)
    for checkpoint in (run / "checkpoints").iterdir():
        lay_pickles(checkpoint, marker)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(manifest | {"status": "failed"}))
    mst("train", "--output-dir", run, "--max-steps", "2", "--resume")
    lay_pickles(run / "adapter", marker)
    mst("chat", run, "--prompt", "hi", "--max-new-tokens", "2")
    mst("merge", run, "--output-dir", tmp_path / f"merged {name[3:]}")

    assert not watched.exists(), watched.read_text()
    assert not list(tmp_path.glob("marker*"))
    assert snapshot(model) == before
    # The commands to type next can be pasted into a shell.
    pasted = re.search(r"mst chat ('.*?)\n  mst", said, re.DOTALL)

    assert pasted is not None
    shown = subprocess.run(
        ["sh", "-c", f"printf %s {pasted[1]}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.stdout == name
    assert not marker.exists()


def test_a_run_directory_holds_no_pickle(finished_run: Path) -> None:
    """Optimizer, random states, weights and all else: safetensors whole, or text."""
    import pickletools
    import zipfile

    files = [each for each in finished_run.rglob("*") if each.is_file() and each.stat().st_size]
    for path in files:
        if path.suffix == ".safetensors":
            read_header(path)  # tensors to the last byte: nothing else fits in
            continue
        path.read_text(encoding="utf-8")

        assert not zipfile.is_zipfile(path)
        with pytest.raises(ValueError):  # noqa: PT011
            list(pickletools.genops(path.read_bytes()))
    assert {"optimizer.safetensors", "random.safetensors"} <= {each.name for each in files}


@pytest.mark.parametrize("command", ["train", "preview", "chat"])
def test_a_model_whose_class_is_its_own_code_is_refused(
    command: str, tiny_model: Path, chat_rows: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "x_own", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_x.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    options = {
        "chat": [str(model), "--prompt", "hi"],
        "preview": ["--model", str(model), "--dataset", str(chat_rows), "--no-text"],
    }.get(command, ["--model", str(model), "--dataset", str(chat_rows)])
    code = cli.main([command, *options])
    said = capfd.readouterr().err

    assert not (tmp_path / "marker").exists()
    if command == "preview":  # it reads the tokenizer alone, which is data
        assert code == 0
        return
    assert code == 1
    assert "It comes with code of its own, which mst never runs" in said
