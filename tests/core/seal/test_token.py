"""Keys on a PKCS#11 token open data and never leave it; SoftHSM 2 stands for the hardware."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mst.cli import main
from mst.errors import EncryptionError, UsageError
from mst.rundir import read_manifest
from mst.seal.keys.ring import ring_of
from mst.seal.keys.token_uri import TokenUri, is_printable, parse_token_uri, uri_of

PIN = "73914682"
# Where Debian, Fedora and Homebrew put it.
_PLACES = (
    "/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so", "/opt/homebrew/lib/softhsm/libsofthsm2.so",
)  # fmt: skip
MODULE = next((each for each in _PLACES if Path(each).is_file()), None)
VECTORS = Path(__file__).with_name("vectors")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Make a token, and return what makes a URI of a key on it."""
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    if MODULE is None or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM 2 is not installed: apt-get install softhsm2")
    (tmp_path / "tokens").mkdir()
    settings, pin = tmp_path / "softhsm2.conf", tmp_path / "pin"
    settings.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(settings))
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "my token", "--pin", PIN,
         "--so-pin", "12345678"],
        check=True, capture_output=True,
    )  # fmt: skip
    pin.write_text(f"{PIN}\n")
    pin.chmod(0o400)

    def of(token: str = "my%20token", key: str = "rows", module: str = MODULE or "") -> str:
        return f"pkcs11:token={token};object={key}?module-path={module}&pin-source=file:{pin}"

    return of


def test_a_key_on_a_token_opens_what_it_encrypted(
    uri: Callable[..., str], rows: Path, key_file: Path, capsys: Capture
) -> None:
    plain, sealed, token = rows.read_bytes(), f"{rows}.mst", ["--pkcs11", uri()]

    assert main(["data", "keygen", *token]) == 0
    assert "pkcs11:token=my%20token;object=rows;id=%" in capsys.readouterr().out
    assert main(["data", "encrypt", str(rows), *token]) == 0
    assert main(["data", "check", sealed, *token]) == 0
    rows.unlink()
    assert main(["data", "decrypt", sealed, *token]) == 0
    assert rows.read_bytes() == plain

    key = ["--key-file", str(key_file)]
    assert main(["data", "rekey", sealed, *token, "--add", "--new-key-file", str(key_file)]) == 0
    assert main(["data", "rekey", sealed, *key, "--new-pkcs11", uri()]) == 0
    capsys.readouterr()
    assert main(["data", "verify", sealed, *token]) == 0
    assert "opened with pkcs11:token=my%20token;object=rows;id=%" in capsys.readouterr().out
    assert main(["data", "verify", sealed, *key]) == 1
    assert main(["data", "verify", sealed]) == 1
    assert "It opens with: pkcs11:token=my%20token;object=rows" in capsys.readouterr().err


def test_another_key_of_the_token_opens_nothing(
    uri: Callable[..., str], rows: Path, capsys: Capture
) -> None:
    for key in ("rows", "other"):
        assert main(["data", "keygen", "--pkcs11", uri(key=key)]) == 0
    assert main(["data", "encrypt", str(rows), "--pkcs11", uri()]) == 0
    capsys.readouterr()

    assert main(["data", "verify", f"{rows}.mst", "--pkcs11", uri(key="other")]) == 1
    assert "does not open with the token's key" in capsys.readouterr().err


def test_the_key_never_leaves_the_token(uri: Callable[..., str]) -> None:
    pkcs11 = pytest.importorskip("pkcs11")
    assert main(["data", "keygen", "--pkcs11", uri()]) == 0
    token = pkcs11.lib(MODULE).get_token(token_label="my token")
    with token.open(user_pin=PIN) as session:
        key = session.get_key(label="rows")

        assert key[pkcs11.Attribute.NEVER_EXTRACTABLE]
        with pytest.raises(pkcs11.AttributeSensitive):
            key[pkcs11.Attribute.VALUE]
    pkcs11.lib(MODULE).finalize()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"token": "gone"}, "names token 'gone', and"),
        ({"key": "gone"}, "token 'my token' has 0 AES keys of that object and id"),
        ({"module": "/nowhere.so"}, "/nowhere.so could not be loaded as a PKCS#11 library"),
    ],
)
def test_what_is_not_there_is_named(
    changes: dict[str, str], problem: str, uri: Callable[..., str], rows: Path, capsys: Capture
) -> None:
    assert main(["data", "encrypt", str(rows), "--pkcs11", uri(**changes)]) == 1
    assert problem in capsys.readouterr().err
    assert not Path(f"{rows}.mst").exists()


def test_a_wrong_pin_is_refused_and_not_shown(
    uri: Callable[..., str], tmp_path: Path, rows: Path, capsys: Capture
) -> None:
    assert main(["data", "keygen", "--pkcs11", uri()]) == 0
    (tmp_path / "pin").chmod(0o600)
    (tmp_path / "pin").write_text("55512345")
    assert main(["data", "encrypt", str(rows), "--pkcs11", uri()]) == 1
    said = "".join(capsys.readouterr())

    assert "token 'my token' refuses the PIN" in said
    assert "55512345" not in said

    (tmp_path / "pin").chmod(0o644)
    assert main(["data", "encrypt", str(rows), "--pkcs11", uri()]) == 1
    assert "chmod 0400" in capsys.readouterr().err


def test_a_token_opens_the_vector(uri: Callable[..., str]) -> None:
    pkcs11 = pytest.importorskip("pkcs11")
    vector = json.loads((VECTORS / "token.json").read_text("utf-8"))
    token = pkcs11.lib(MODULE).get_token(token_label="my token")
    with token.open(user_pin=PIN, rw=True) as session:
        session.create_object(
            {
                pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
                pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.AES,
                pkcs11.Attribute.VALUE: bytes.fromhex(vector["token_key"]),
                pkcs11.Attribute.LABEL: "rows",
                pkcs11.Attribute.DECRYPT: True,
                pkcs11.Attribute.TOKEN: True,
            }
        )
    pkcs11.lib(MODULE).finalize()
    with ring_of(None, None, uri()).open(VECTORS / vector["file"]) as found:
        assert found.data_key.hex() == vector["data_key"]


@pytest.mark.slow
def test_a_run_trains_on_rows_whose_key_is_on_a_token(
    uri: Callable[..., str], tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    token = ["--pkcs11", uri()]
    assert main(["data", "keygen", *token]) == 0
    assert main(["data", "encrypt", str(rows), *token]) == 0
    run = tmp_path / "run"
    mst = (sys.executable, "-m", "mst")
    options = {
        "model": tiny_model, "dataset": f"{rows}.mst", "output-dir": run, "device": "cpu",
        "threads": 1, "max-steps": 2, "per-device-train-batch-size": 2,
        "gradient-accumulation-steps": 1, "val-size": 4,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"COLUMNS": "200"}
    for command in (
        (*mst, "train", *flags, *token),
        (*mst, "eval", str(run), "--metric", "loss", "--device", "cpu", *token),
    ):
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

        assert done.returncode == 0, done.stdout + done.stderr
        assert "loss" in done.stdout
    assert read_manifest(run).data[0].key.startswith("pkcs11:token=my%20token;object=rows;id=%")
    for file in run.rglob("*"):
        assert file.is_dir() or PIN.encode() not in file.read_bytes()


def test_the_package_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = tmp_path / "pin"
    pin.write_text(PIN)
    pin.chmod(0o400)
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    ring = ring_of(None, None, f"pkcs11:token=a;object=b?pin-source={pin}")
    with pytest.raises(EncryptionError, match="mst-train\\[pkcs11\\]"):
        ring.open(VECTORS / "token.jsonl.mst")


def test_a_uri_is_read_as_rfc_7512_has_it() -> None:
    found = parse_token_uri(
        "pkcs11:token=The%20Software%20PKCS%2311;serial=4A;object=a%3bb;id=%00%ff;type=secret-key"
        "?module-path=/usr/lib/p.so&pin-source=file:///home/me/pin"
    )

    assert found == TokenUri(
        "The Software PKCS#11", "4A", "a;b", b"\x00\xff", "/usr/lib/p.so", Path("/home/me/pin")
    )
    written = uri_of("The Software PKCS#11", "a;b", b"\x00\xff")
    assert written == "pkcs11:token=The%20Software%20PKCS%2311;object=a%3Bb;id=%00%ff"
    assert is_printable(written)
    assert not is_printable("pkcs11:token=\x1b[2J")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("token=a;object=b", "does not begin with pkcs11:"),
        ("pkcs11:token=a;object=b?pin-value=5551234", "has the PIN in pin-value"),
        ("pkcs11:token=a;token=b", "each once; found 'token'"),
        ("pkcs11:token=a;object=b;colour=5551234", "found 'colour'"),
        ("pkcs11:token=a;object=b?5551234", "found something else"),
        ("pkcs11:token=a;object=b?pin-value:5551234", "found something else"),
        ("pkcs11:token=a;object=b&pin=x;5551234=", "found something else"),
        ("pkcs11:token=a", "found token"),
        ("pkcs11:", "found nothing"),
        ("pkcs11:token=a;object=b;type=private", "one secret key of one token"),
        ("pkcs11:token=a;object=b?pin-source=|5551234", "of the form file:/PATH"),
    ],
)
def test_another_uri_is_refused_and_not_quoted(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_token_uri(text)

    assert problem in str(caught.value)
    assert "5551234" not in str(caught.value)
