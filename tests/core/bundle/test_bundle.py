"""A bundle made of small wheels: what is in it, what is refused, and that it installs alone."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.core.bundle.conftest import TARGET_310, make_wheel

from mst.bundle import install
from mst.bundle.create import _part
from mst.bundle.pip import configured_places
from mst.bundle.target import own_python
from mst.cli import main
from mst.errors import BundleError
from mst.seal.supply.signature import generate_key

# Where nobody listens, and PIP_* that would lead there.
ASTRAY = {"PIP_INDEX_URL": "http://192.0.2.1/simple", "PIP_FIND_LINKS": "http://192.0.2.1/"}


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: each for name, each in os.environ.items() if not name.startswith("PIP_")}
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **more}


def create(out: Path, *options: str) -> int:
    return main(["bundle", "create", "--device", "cpu", "--out", str(out), *options])


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    private = tmp_path_factory.mktemp("key") / "signing.key"
    generate_key(private)
    return private


@pytest.fixture(scope="module")
def bundle(
    wheelhouse: Path,
    tiny_model: Path,
    key: Path,
    off_network: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A signed bundle with the tiny model, made without a network by a pip that is led astray."""
    place = tmp_path_factory.mktemp("bundle")
    done = subprocess.run(
        [
            *off_network, sys.executable, "-m", "mst", "bundle", "create", "--device", "cpu",
            "--wheels", str(wheelhouse), "--extra", "--model", str(tiny_model), "--sign", str(key),
            "--out", str(place / "kit"),
        ],
        env=environment(place / "home", **ASTRAY), capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "network    none" in done.stdout
    assert [each.name for each in place.iterdir() if each.name != "home"] == ["kit"]
    return place / "kit"


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """The bundle, to be changed; its files are links to one copy where they aren't changed."""
    return shutil.copytree(bundle, tmp_path / "kit", copy_function=os.link)


def change(path: Path, place: int = -1) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.unlink()
    path.write_bytes(data)


def refused(capsys: pytest.CaptureFixture[str], directory: Path, *options: str) -> str:
    code = main(["bundle", "verify", str(directory), *options])
    said = capsys.readouterr().err

    assert code == 1, said
    return said


def test_it_holds_what_a_machine_alone_needs(bundle: Path, tiny_model: Path) -> None:
    manifest = json.loads((bundle / install.MANIFEST).read_text(encoding="utf-8"))
    packages = {each["name"]: each for each in manifest["packages"]}
    here = {each.relative_to(bundle).as_posix() for each in bundle.rglob("*") if each.is_file()} - {
        install.MANIFEST,
        install.SUMS,
        install.SIGNATURE,
    }

    assert {"mst-train", "pip", "torch", "networkx"} <= packages.keys()
    assert manifest["torch"]["build"] == "cpu"
    assert manifest["target"]["device"] == "cpu"
    assert manifest["created_by"].startswith("mst ")
    assert set(manifest["files"]) == here
    assert (bundle / "source" / "mst_train-0.1.0.tar.gz").is_file()
    with zipfile.ZipFile(next(bundle.glob("wheels/mst_train-*.whl"))) as wheel:
        assert "mst_train-0.1.0.data/data/share/man/man1/mst.1" in wheel.namelist()
    assert manifest["models"][0]["path"] == f"models/{tiny_model.name}"
    weights = f"models/{tiny_model.name}/model.safetensors"
    assert manifest["files"][weights]["bytes"] == (tiny_model / "model.safetensors").stat().st_size


def test_programs_of_any_system_verify_it(bundle: Path, key: Path) -> None:
    signed = ["-verify", f"{key}.pub", "-signature", install.SIGNATURE]
    for command in (
        ["sha256sum", "--check", "--quiet", "--strict", install.SUMS],
        ["openssl", "dgst", "-sha256", *signed, install.SUMS],
    ):
        if shutil.which(command[0]) is None:
            pytest.skip(f"wants {command[0]}")
        done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stdout + done.stderr


def test_its_bill_of_materials_is_valid(bundle: Path) -> None:
    pytest.importorskip("jsonschema", reason="needs cyclonedx-python-lib[json-validation]")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (bundle / "sbom.cdx.json").read_text(encoding="utf-8")
    names = {each["name"] for each in json.loads(text)["components"]}

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert {"torch", "pip", "tiny-llama"} <= names


def test_verify_says_what_it_is(
    bundle: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "verify", str(bundle), "--public-key", f"{key}.pub", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["tiny-llama"]
    assert len(found["public_key_sha256"]) == 64
    assert main(["bundle", "verify", str(bundle)]) == 0
    assert "its signature was not verified" in capsys.readouterr().out


def test_one_command_installs_it_without_a_network(
    bundle: Path, key: Path, off_network: list[str], tmp_path: Path
) -> None:
    home = tmp_path / "empty"
    home.mkdir()
    done = subprocess.run(
        [*off_network, sys.executable, str(bundle / "install.py"), "--public-key", f"{key}.pub"],
        cwd=tmp_path, env=environment(home, PIP_NO_INDEX="1", PIP_TARGET="/nowhere"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    program = tmp_path / ".venv" / "bin" / "mst"
    assert f"next       {program} train --model {bundle}/models/tiny-llama" in done.stdout
    (activate,) = re.findall(r"^to use it  (\. \S+)", done.stdout, re.MULTILINE)
    version = subprocess.run(
        ["sh", "-c", f"{activate} && mst --version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith("mst 0.1.0")
    receipt = tmp_path / ".venv" / install.RECEIPT
    assert receipt.read_bytes() == (bundle / install.MANIFEST).read_bytes()
    again = subprocess.run(
        [sys.executable, str(bundle / "install.py")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 1
    assert "exists and is left as it is" in again.stderr


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "install.py",
        "requirements.txt",
        "models/tiny-llama/model.safetensors",
        "wheels/torch-*.whl",
        "source/*.tar.gz",
        "sbom.cdx.json",
        "README.txt",
    ],
)
def test_one_flipped_bit_is_refused_by_name(
    name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(copied.glob(name))
    change(path, path.stat().st_size // 2)

    assert f"{path.relative_to(copied)} differs from its SHA-256" in refused(capsys, copied)
    done = subprocess.run(
        [sys.executable, str(copied / "install.py"), "--verify-only"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # A changed installer may say anything; that is what the signature and sha256sum are for.
    assert name == "install.py" or (
        done.returncode,
        str(path.relative_to(copied)) in done.stderr,
    ) == (1, True)


def test_a_missing_a_further_and_a_linked_file_are_refused_by_name(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied / "models/tiny-llama/config.json"
    config.unlink()
    assert "models/tiny-llama/config.json is missing" in refused(capsys, copied)
    config.symlink_to("/etc/hostname")
    assert "'models/tiny-llama/config.json' is no plain file" in refused(capsys, copied)
    config.unlink()
    (copied / "wheels/extra.whl").touch()
    assert "wheels/extra.whl is not listed" in refused(capsys, copied)
    (copied / "\x1b[2J").touch()
    assert "'\\x1b[2J' is no plain file" in refused(capsys, copied)
    (copied / install.SUMS).unlink()
    assert "has no SHA256SUMS, so it is no whole bundle" in refused(capsys, copied)


def test_nothing_of_a_bundle_runs_before_it_is_verified(copied: Path) -> None:
    for name in ("argparse", "json", "hashlib", "venv"):
        (copied / f"{name}.py").write_text("print('ran')\nraise SystemExit(0)\n")
    done = subprocess.run(
        [sys.executable, "install.py", "--verify-only"],
        cwd=copied, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (1, "")
    assert "argparse.py is not listed" in done.stderr


def test_a_changed_listing_signature_or_key_is_refused(
    copied: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_key(tmp_path / "other.key")
    signed = ("--public-key", f"{key}.pub")
    installer = [sys.executable, str(copied / "install.py"), "--verify-only", *signed]

    assert "does not sign" in refused(capsys, copied, "--public-key", f"{tmp_path}/other.key.pub")
    listing = copied / install.SUMS
    lines = listing.read_text(encoding="utf-8")
    listing.unlink()
    listing.write_text(lines.replace("README.txt", "README.tx_"), encoding="utf-8")
    assert "does not sign SHA256SUMS" in refused(capsys, copied, *signed)
    assert "README.tx_ is missing, README.txt is not listed" in refused(capsys, copied)
    done = subprocess.run(installer, capture_output=True, text=True, check=False)
    assert (done.returncode, "does not sign" in done.stderr) == (1, True)
    listing.write_text(lines, encoding="utf-8")
    change(copied / install.SIGNATURE)
    assert "SHA256SUMS.sig does not sign" in refused(capsys, copied, *signed)
    (copied / install.SIGNATURE).unlink()
    assert "signed by `mst bundle create --sign KEY`" in refused(capsys, copied, *signed)


def machine(**changed: str) -> dict[str, Any]:
    here = {
        "python": own_python(), "arch": os.uname().machine, "glibc": "2.17", "device": "cpu",
    }  # fmt: skip
    return here | changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"python": "3.14"}, "is for CPython 3.14 on Linux"),
        ({"arch": "riscv64"}, "this machine is"),
        ({"glibc": "9.99"}, "this system has glibc"),
    ],
)
def test_a_bundle_for_another_machine_is_refused_by_what_differs(
    changed: dict[str, str], said: str
) -> None:
    install.check_machine(machine())
    with pytest.raises(install.Refused, match=said):
        install.check_machine(machine(**changed))


def test_an_installation_in_the_bundle_or_without_space_leaves_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    manifest = json.loads((bundle / install.MANIFEST).read_text(encoding="utf-8"))
    with pytest.raises(install.Refused, match="lies in the bundle, which stays as it was"):
        install.install(str(bundle), str(bundle / ".venv"), manifest | {"target": machine()})
    large = manifest | {"installed_bytes": 1 << 60, "target": machine()}
    with pytest.raises(install.Refused, match="the environment takes about"):
        install.install(str(bundle), str(tmp_path / "env"), large)

    assert list(tmp_path.iterdir()) == []


def test_an_installation_that_fails_leaves_nothing_and_one_that_was_killed_is_made_again(
    copied: Path, tmp_path: Path
) -> None:
    place = tmp_path / "env"
    place.mkdir()
    (place / install.UNFINISHED).touch()
    change(next(copied.glob("wheels/networkx-*.whl")))  # after it was verified
    manifest = json.loads((copied / install.MANIFEST).read_text(encoding="utf-8"))
    with pytest.raises(install.Refused, match=r"pip failed with code 1: .*Nothing is installed"):
        install.install(str(copied), str(place), manifest | {"target": machine()})

    assert not place.exists()


def test_two_installers_do_not_fill_one_place(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / install.MANIFEST).read_text(encoding="utf-8"))
    place = tmp_path / "env"

    def begin() -> None:
        install.install(str(bundle), str(place), manifest | {"target": machine()})

    with install._held(str(place)) as lock:
        (place / "theirs").touch()
        with pytest.raises(install.Refused, match=r"another install\.py is installing into"):
            begin()
        # What a killed installer started holds the place as long as it runs.
        pip = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))

        assert (place / "theirs").exists()
    try:
        with pytest.raises(install.Refused, match=r"another install\.py is installing into"):
            begin()
    finally:
        pip.kill()
        pip.wait()
    (place / install.UNFINISHED).unlink()
    with pytest.raises(install.Refused, match="exists and is left as it is"):
        begin()

    assert (place / "theirs").exists()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(install.Refused, match="exists and is left as it is"):
        install.install(str(bundle), str(tmp_path / "link"), manifest | {"target": machine()})


def test_an_old_python_can_read_the_installer_to_be_refused() -> None:
    ast.parse(Path(install.__file__).read_text(encoding="utf-8"), feature_version=(3, 6))


def test_a_bundle_for_another_python_and_chip_has_that_ones_wheels(
    wheelhouse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a plugin from an index that pip is set to, which is told and recorded."""
    index = tmp_path / "simple"
    for wheel in [*wheelhouse.glob("*.whl"), make_wheel(tmp_path, "mst-mychip", "1.0")]:
        name = wheel.name.split("-")[0].lower().replace("_", "-").replace(".", "-")
        (index / name).mkdir(parents=True, exist_ok=True)
        with (index / name / "index.html").open("a", encoding="utf-8") as page:
            page.write(f'<a href="{wheel.as_uri()}">{wheel.name}</a>\n')
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index.as_uri())
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    options = ["--python", TARGET_310, "--platform", "manylinux_2_28_aarch64", "--extra"]
    log = ["--audit-log", str(tmp_path / "audit")]
    code = create(tmp_path / "kit", *options, "--package", "mst-mychip>=1", *log)
    out, err = capsys.readouterr()

    assert (code, err) == (0, ""), err
    manifest = json.loads((tmp_path / "kit" / install.MANIFEST).read_text(encoding="utf-8"))
    files = {each["name"]: each["file"] for each in manifest["packages"]}
    events = [
        json.loads(line)
        for path in (tmp_path / "audit").glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]

    assert f"network    pip gets wheels, as it is set up: {index}" in out
    assert files["torch"].endswith("cp310-cp310-manylinux_2_28_aarch64.whl")
    assert "tomli" in files  # python_version < '3.11', whatever Python makes the bundle
    assert "mst-mychip" in files
    told = [each["facts"]["places"] for each in events if each["event"] == "bundle.network"]
    assert told == [[str(index)]]
    with pytest.raises(install.Refused, match=r"is for CPython 3\.10 on Linux with glibc 2\.28"):
        install.check_machine(manifest["target"])


def test_a_wheel_that_is_not_there_is_named(
    wheelhouse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(wheelhouse, fewer, ignore=shutil.ignore_patterns("networkx-*"))
    make_wheel(fewer, "mst-train", "0.1.0", ["torch"])
    code = create(tmp_path / "kit", "--wheels", str(fewer), "--extra")
    said = capsys.readouterr().err

    assert code == 1
    assert "has no wheels that fit together" in said
    assert "networkx" in said
    assert [each.name for each in tmp_path.iterdir()] == ["fewer"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--package", "x @ http://192.0.2.1/x.whl"], "--package takes a name"),
        (["--platform", "win_amd64"], "--platform takes auto"),
        (["--platform", "manylinux_2_5_aarch64"], "--platform takes auto"),
        (["--python", "3.9"], "--python takes one of 3.10"),
        (["--wheels", "."], "holds no *.whl"),
        (["--source", "."], "holds no sources of mst"),
        (["--sign", "missing.key"], "cannot read the private key"),
        (["--model", "./missing"], "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_fetched(
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = create(tmp_path / "kit", *options)

    assert code in (1, 2)
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_pickled_weights_are_refused_and_pickles_beside_others_left_out(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "pytorch_model.bin").touch()
    (model / "modeling_tiny.py").touch()
    (model / ".git").mkdir()
    (model / ".git/config").touch()
    (tmp_path / "none").mkdir()
    code = create(tmp_path / "kit", "--model", str(model), "--wheels", str(tmp_path / "none"))

    assert (code, "holds no *.whl" in capsys.readouterr().err) == (1, True)
    from mst.bundle.models import find_models

    left_out = find_models([str(model)], {})[0].left_out
    assert left_out == (".git/config", "modeling_tiny.py", "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert create(tmp_path / "kit", "--model", str(model)) == 1
    assert "mst models convert" in capsys.readouterr().err


def test_a_place_of_pips_is_named_without_its_password(tmp_path: Path) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text(
        "[global]\nextra-index-url =\n  https://u:zqxvkw@a.example/simple\n  https://b.example/\n"
    )
    found = configured_places({**os.environ, "PIP_CONFIG_FILE": str(settings)})

    assert {"a.example", "b.example"} <= set(found)
    assert "zqxvkw" not in " ".join(found)


def test_models_that_the_disk_does_not_hold_are_refused_first(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    size = 2 * shutil.disk_usage(tmp_path).total
    try:
        os.truncate(model / "model.safetensors", min(size, 15 << 40))
    except OSError:
        pytest.skip("wants a file system with large sparse files")

    assert create(tmp_path / "kit", "--model", str(model)) == 1
    assert "free. Free some space" in capsys.readouterr().err


@pytest.fixture
def begun(wheelhouse: Path, tmp_path: Path) -> Iterator[Callable[[int], int]]:
    """Return a function that begins a bundle, sends it a signal, and returns its exit code."""
    out = tmp_path / "kit"
    processes = []

    def send(number: int) -> int:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "mst", "bundle", "create", "--device", "cpu", "--extra",
                "--wheels", str(wheelhouse), "--out", str(out),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        while not (tmp_path / ".kit.part" / "wheels").is_dir() and process.poll() is None:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if process.wait(60) != 0:
            return process.returncode
        # It was done before the signal came.
        shutil.rmtree(out)
        return send(number)

    yield send
    for each in processes:
        each.kill()
        each.wait()


def test_a_creation_that_was_killed_leaves_nothing_that_looks_whole(
    begun: Callable[[int], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begun(signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "kit").exists()
    assert "is no whole bundle" in refused(capsys, tmp_path / ".kit.part")
    with _part(tmp_path / "kit") as part:
        assert list(part.iterdir()) == []
        with pytest.raises(BundleError, match="another mst bundle create is writing"):
            _part(tmp_path / "kit").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_creation_that_was_interrupted_leaves_nothing(
    begun: Callable[[int], int], tmp_path: Path
) -> None:
    assert begun(signal.SIGINT) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_kit_trains_without_a_network(off_network: list[str], tmp_path: Path) -> None:
    """With real wheels: MST_TEST_WHEELS names a directory with all that mst[demo,…] needs."""
    wheels = os.environ.get("MST_TEST_WHEELS")
    if wheels is None or not off_network:
        pytest.skip("wants MST_TEST_WHEELS=DIR, and network namespaces")
    from benchmarks.air_gap_kit import kit

    figures = kit(tmp_path, wheels, 2)

    assert len(figures["losses"]) == 2
    assert all(math.isfinite(each) for each in figures["losses"])
