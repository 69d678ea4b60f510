"""The real torch_npu wheel, in an environment of its own: without CANN, and with a stub of it.

The wheel's own Python and C++ run here; the stub (tests/vendor/fakecann) has no operators, so this
is about detection, names and refusals. Training as "npu" is tested on the simulated chip.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from mst.launch import worker_environment
from mst_backends import ascend
from mst_backends.ascend_soc import WITH_BF16, WITHOUT_BF16
from mst_backends.cann import find_cann

pytestmark = pytest.mark.slow

FAKECANN = Path(__file__).parents[1] / "vendor/fakecann/fakecann.c"
# What torch_npu is linked against, or looks for while it starts.
LIBRARIES = (
    "ascendcl", "acl_op_compiler", "acl_tdt_channel", "ascend_hal", "ge_runner", "graph", "hccl",
)  # fmt: skip
DOWNLOAD_SECONDS = 120
# One process for all names: each child of `fork` starts torch_npu anew, in a tenth of a second.
ASK = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
for variable, value, question in json.load(sys.stdin):
    sys.stdout.flush()
    if os.fork() == 0:
        os.environ[variable] = value
        print(json.dumps([value, eval(question)]), flush=True)
        os._exit(0)
    os.wait()
"""
BAD_PREFIXES = ("ASCEND", "CANN", "FAKECANN", "LD_LIBRARY_PATH", "MST_", "TORCH_DEVICE_BACKEND")


@dataclass(frozen=True)
class Environment:
    """A Python that has the wheel, and the variables of a shell without CANN."""

    python: Path
    site_packages: Path
    variables: Mapping[str, str]


def run(
    place: Environment, *arguments: str, text: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(place.python), *arguments],
        input=text,
        env={**place.variables, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that shares this one's packages and has the wheel besides."""
    root = tmp_path_factory.mktemp("torch_npu")
    wheel = download(root / "wheel")
    venv.create(root / "venv", with_pip=False)
    python = root / "venv/bin/python"
    scheme = {"base": str(root / "venv"), "platbase": str(root / "venv")}
    packages = Path(sysconfig.get_path("purelib", vars=scheme))
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # addsitedir, for the .pth file of an editable install.
    lines = [f"import site; site.addsitedir({one!r})\n" for one in sorted(shared)]
    (packages / "shared.pth").write_text("".join(lines))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(BAD_PREFIXES)}
    return Environment(python, packages, {**variables, "COLUMNS": "200", "OMP_NUM_THREADS": "1"})


def download(folder: Path) -> Path:
    """Return the wheel that goes with the installed torch, or skip."""
    release = importlib.metadata.version("torch").partition("+")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), f"torch-npu=={release}"],
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"no torch-npu {release} wheel to be had for this Python and machine: {last}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a shell that has loaded the stub of CANN."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the stub of CANN with")
    home = tmp_path_factory.mktemp("cann")
    libraries = home / "lib64"
    for folder in ("lib64", "opp", "runtime", "compiler"):
        (home / folder).mkdir()
    first = libraries / f"lib{LIBRARIES[0]}.so"
    options = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([compiler, *options, "-o", str(first), str(FAKECANN)], check=True)
    for name in LIBRARIES[1:]:
        (libraries / f"lib{name}.so").symlink_to(first.name)
    return {
        "LD_LIBRARY_PATH": str(libraries),
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
    }


def ask(
    place: Environment, stub: Mapping[str, str], questions: list[tuple[str, str, str]]
) -> dict[str, object]:
    """Return the answer to each (variable, value, question) by value."""
    done = run(place, "-c", ASK, text=json.dumps(questions), **stub)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    assert len(answers) == len(questions), done.stderr
    return dict(answers)


def torch_check(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    checks: list[dict[str, str]] = json.loads(done.stdout)["checks"]
    return next(check for check in checks if check["name"] == "import torch")


def test_without_cann_the_wheel_breaks_torch_but_not_a_worker(place: Environment) -> None:
    broken = run(place, "-c", "import torch")
    code = "import torch; print(torch.ones(3).sum().item())"
    worker = subprocess.run(
        [str(place.python), "-c", code],
        env=worker_environment(place.variables, {}),
        capture_output=True,
        text=True,
        check=False,
    )

    assert broken.returncode == 1
    assert "torch_npu" in broken.stderr
    assert (worker.stdout.strip(), worker.returncode) == ("3.0", 0), worker.stderr


def test_doctor_says_to_uninstall_it_where_there_is_no_chip(place: Environment) -> None:
    as_text = run(place, "-m", "mst", "doctor")
    as_json = run(place, "-m", "mst", "doctor", "--json")

    check = torch_check(as_json)
    assert (as_text.returncode, as_json.returncode) == (1, 1)
    assert "libhccl.so: cannot open shared object file" in check["found"]
    assert check["advice"].startswith("python -m pip uninstall torch-npu, for there is no Ascend")
    assert "where there is one" in check["advice"]
    assert f"To do: {check['advice']}" in as_text.stdout
    assert "no /dev/davinci*" in as_text.stdout


def test_doctor_names_the_script_where_there_is_a_chip(place: Environment, tmp_path: Path) -> None:
    script = tmp_path / "usr/local/Ascend/cann/set_env.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/davinci0").touch()
    (tmp_path / "bin").mkdir()
    table = Path(__file__).parents[1] / "data/npu_smi/910b4-1_25.2.0.txt"
    program = tmp_path / "bin/npu-smi"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = info ] && cat '{table}'\n")
    program.chmod(0o755)

    path = f"{tmp_path / 'bin'}:{place.variables['PATH']}"
    done = run(place, "-m", "mst", "doctor", "--json", MST_ASCEND_ROOT=str(tmp_path), PATH=path)

    assert done.returncode == 1
    assert torch_check(done)["advice"] == (
        f"CANN is not loaded, ASCEND_HOME_PATH is not set: source {script}"
    )


def test_devices_are_listed_although_torch_is_broken(place: Environment) -> None:
    done = run(place, "-m", "mst", "devices")

    assert done.returncode == 0, done.stderr
    assert "cpu:0" in done.stdout
    assert "ascend: not found: no /dev/davinci*" in done.stdout
    assert "breaks `import torch`: python -m pip uninstall torch-npu" in done.stdout


def test_training_on_it_is_refused_with_the_reason(
    place: Environment, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    options = ["--model", str(tiny_model), "--dataset", str(chat_rows), "--device", "npu"]
    done = run(place, "-m", "mst", "train", *options, "--output-dir", str(tmp_path / "run"))

    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode not in (0, -6, -11)
    assert "no 'npu' device to use here (found: cpu:0)" in said
    assert "python -m pip uninstall torch-npu" in said
    assert not (tmp_path / "run").exists()


def test_with_cann_it_starts_and_doctor_is_content(
    place: Environment, stub: Mapping[str, str]
) -> None:
    code = (
        "from mst_backends import ascend; ascend.mst_activate(); ascend.mst_activate();"
        "import torch; print(torch.npu.device_count(), torch.accelerator.current_accelerator(),"
        " torch.ones(2, device='cpu').npu().device)"
    )
    started = run(place, "-W", "ignore", "-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **stub)
    done = run(place, "-m", "mst", "doctor", "--json", **stub)

    assert started.stdout.split() == ["2", "npu", "npu:0"], started.stderr
    assert torch_check(done)["status"] == "ok"


def test_our_table_names_the_chips_that_it_names(place: Environment) -> None:
    library = (place.site_packages / "torch_npu/lib/libtorch_npu.so").read_bytes()
    names = {one.decode() for one in re.findall(rb"\0(Ascend\d{3}[\w-]+)(?=\0)", library)}

    # The 310B is a board for inference at the edge; mst lists it as unknown.
    theirs = {name for name in names if not name.startswith("Ascend310B")}
    assert theirs == WITH_BF16 | WITHOUT_BF16


def test_bf16_by_name_is_what_it_says(place: Environment, stub: Mapping[str, str]) -> None:
    names = sorted(WITH_BF16 | WITHOUT_BF16)
    question = "[torch.npu.get_device_name(0), torch.npu.is_bf16_supported()]"
    answers = ask(place, stub, [("FAKECANN_SOC", name, question) for name in names])

    assert answers == {name: [name, name in WITH_BF16] for name in names}


def test_visible_devices_are_counted_as_it_counts_them(
    place: Environment, stub: Mapping[str, str]
) -> None:
    texts = ["0", "1,3", "0,1,2,3", "1,2,9,3", "1, 2", "2,1", "1,1", "", "none", "-1", "8", ",1"]
    questions = [(ascend.VISIBLE, text, "torch.npu.device_count()") for text in texts]
    answers = ask(place, {**stub, "FAKECANN_DEVICES": "4"}, questions)

    assert answers == {text: len(ascend.visible_numbers(text, 4)) for text in texts}


@pytest.mark.parametrize("without", ["", "ASCEND_OPP_PATH", "LD_LIBRARY_PATH"])
def test_cann_counts_as_loaded_when_the_wheel_can_load(
    place: Environment, stub: Mapping[str, str], without: str
) -> None:
    variables = {name: value for name, value in stub.items() if name != without}
    missing = find_cann(Path("/"), variables).missing

    imported = run(place, "-c", "import torch", **variables).returncode == 0

    assert imported == (missing == "") == (without == "")


def test_a_job_on_the_cpu_runs_beside_it(
    place: Environment, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    options = ["--model", str(tiny_model), "--dataset", str(chat_rows), "--device", "cpu"]
    done = run(
        place, "-m", "mst", "train", *options, "--max-steps", "1", "--output-dir",
        str(tmp_path / "run"),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
