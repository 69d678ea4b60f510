"""Signatures and listings of models: made offline, and every change is found before use."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mst import cli, rundir
from mst.errors import ModelError, MstError, RunError, UsageError
from mst.seal.supply.before_use import verify_before_use
from mst.seal.supply.listing import hashes_of, listing_text, read_listing, verify_listing
from mst.seal.supply.signature import generate_key, sign, verify_signature
from mst.tuned import of_run

pytest.importorskip("model_signing", reason="needs mst-train[sign]")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    path = shutil.copytree(tiny_model, tmp_path / "model")
    (path / "sub").mkdir()
    (path / "sub" / "notes.txt").write_text("a")
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    generate_key(tmp_path / "key")
    return tmp_path / "key"


def public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight's bit": lambda model: flip(model / "model.safetensors"),
    "a file gone": lambda model: (model / "tokenizer_config.json").unlink(),
    "a file more": lambda model: (model / "chat_template.jinja").write_text("x"),
    "a file in a directory": lambda model: (model / "sub" / "notes.txt").write_text("b"),
    "two files swapped": lambda model: (
        (model / "config.json").rename(model / "sub" / "x"),
        (model / "generation_config.json").rename(model / "config.json"),
        (model / "sub" / "x").rename(model / "generation_config.json"),
    ),
    "a hidden file": lambda model: (model / ".hidden").write_text("x"),
}


def test_a_key_is_its_owners_alone_and_never_overwritten(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o400
    with pytest.raises(RunError, match="never overwritten"):
        generate_key(key)


@pytest.mark.parametrize("change", CHANGES)
def test_a_signature_and_a_listing_find_every_change(model: Path, key: Path, change: str) -> None:
    signature, listing = model.with_name("model.sig"), model.with_name("model.sha256")
    signed = sign(model, key, signature)
    listing.write_text(listing_text(hashes_of(model)))
    verified = verify_signature(model, signature, public(key))

    assert verified == signed
    assert verified.signature.files == verify_listing(model, listing) == 6
    CHANGES[change](model)
    with pytest.raises(ModelError, match="is not what"):
        verify_signature(model, signature, public(key))
    with pytest.raises(ModelError, match="is not what"):
        verify_listing(model, listing)


def test_another_key_or_an_edited_signature_is_refused(
    model: Path, key: Path, tmp_path: Path
) -> None:
    signature = tmp_path / "model.sig"
    sign(model, key, signature)
    generate_key(tmp_path / "other")
    with pytest.raises(ModelError, match="is not"):
        verify_signature(model, signature, tmp_path / "other.pub")

    text = signature.read_text()
    for place in range(0, len(text), max(1, len(text) // 60)):
        signature.write_text(text[:place] + chr((ord(text[place]) + 1) % 128) + text[place + 1 :])
        try:
            verify_signature(model, signature, public(key))
        except ModelError:
            continue
        # What it says of itself beside the signed payload may change, what was signed may not.
        before, after = json.loads(text), json.loads(signature.read_text())

        assert before["dsseEnvelope"]["payload"] == after["dsseEnvelope"]["payload"]
    signature.write_text('{"a":' * 5000)
    with pytest.raises(ModelError):
        verify_signature(model, signature, public(key))


def test_a_signature_in_the_directory_covers_all_but_itself(model: Path, key: Path) -> None:
    sign(model, key, model / "model.sig")
    sign(model, key, model / "model.sig")  # again, over itself
    (model / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    found = verify_signature(model, model / "model.sig", public(key))

    assert found.not_covered == (".gitattributes",)
    assert found.signature.files == 6


def test_a_signature_that_leaves_a_file_out_is_refused(
    model: Path, key: Path, tmp_path: Path
) -> None:
    from model_signing import hashing, signing

    config = hashing.Config().set_ignored_paths(paths=["chat_template.jinja"])  # type: ignore[no-untyped-call]
    maker = signing.Config().set_hashing_config(config)  # type: ignore[no-untyped-call]
    (model / "chat_template.jinja").write_text("signed by nobody")
    maker.use_elliptic_key_signer(private_key=key).sign(model, tmp_path / "model.sig")
    with pytest.raises(ModelError, match=r"leaves out 1 files of .* 'chat_template.jinja'"):
        verify_signature(model, tmp_path / "model.sig", public(key))


def test_a_model_in_a_hubs_cache_is_signed_and_verified(
    model: Path, key: Path, tmp_path: Path
) -> None:
    """Links into the blobs beside the snapshot; a signature of a plain copy holds there too."""
    signature = tmp_path / "model.sig"
    sign(model, key, signature)
    blobs = tmp_path / "models--org--tiny" / "blobs"
    snapshot = blobs.parent / "snapshots" / "abc"
    for each in [each for each in model.rglob("*") if each.is_file()]:
        blob, place = blobs / each.name, snapshot / each.relative_to(model)
        blob.parent.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(each, blob)
        place.symlink_to(blob)

    assert verify_signature(snapshot, signature, public(key)).signature.files == 6
    sign(snapshot, key, signature)
    assert verify_signature(snapshot, signature, public(key)).signature.files == 6
    flip(blobs / "model.safetensors")
    with pytest.raises(ModelError, match="is not what"):
        verify_signature(snapshot, signature, public(key))


def test_a_signature_of_the_reference_tool_is_verified(
    model: Path, key: Path, tmp_path: Path
) -> None:
    from model_signing import signing

    maker = signing.Config()  # type: ignore[no-untyped-call]
    maker.use_elliptic_key_signer(private_key=key).sign(model, tmp_path / "model.sig")

    assert verify_signature(model, tmp_path / "model.sig", public(key)).signature.files == 6


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0o444, "others than you can read"),
        (b"no key", 0o400, "no private key in PEM"),
        ("p256k1", 0o400, "no key on P-256"),
        ("passphrase", 0o400, "passphrase"),
    ],
)
def test_a_key_that_will_not_do_is_told(
    model: Path, key: Path, content: bytes | str | None, mode: int, message: str
) -> None:
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric import ec

    key.chmod(0o600)
    if isinstance(content, str):
        curve = ec.SECP256K1() if content == "p256k1" else ec.SECP256R1()
        lock = to.BestAvailableEncryption(b"x") if content == "passphrase" else to.NoEncryption()
        content = ec.generate_private_key(curve).private_bytes(
            to.Encoding.PEM, to.PrivateFormat.PKCS8, lock
        )
    if content is not None:
        key.write_bytes(content)
    key.chmod(mode)
    with pytest.raises(UsageError, match=message):
        sign(model, key, model.with_name("model.sig"))

    assert not model.with_name("model.sig").exists()


@pytest.mark.parametrize(
    "text",
    ["", "x", f"{'0' * 64}  ../../etc/passwd\n", f"{'0' * 64}  /etc/passwd\n",
     f"{'0' * 64}  a\n{'1' * 64}  a\n", f"{'0' * 63}  a\n"],
)  # fmt: skip
def test_a_listing_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(ModelError, match=r"no listing|lists no file"):
        read_listing(tmp_path / "list")


def test_sha256sum_reads_our_listing_and_we_read_its(model: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list"
    listing.write_text(listing_text(hashes_of(model)))
    subprocess.run(["sha256sum", "-c", "--quiet", str(listing)], cwd=model, check=True)
    made = subprocess.run(
        "find . -type f | xargs sha256sum", shell=True, cwd=model, capture_output=True, check=True
    )
    listing.write_bytes(made.stdout)

    assert verify_listing(model, listing) == 6


def test_the_commands_sign_and_verify_without_a_connection(model: Path, tmp_path: Path) -> None:
    script = f"""
import sys
seen = []
def watch(event, args):
    if event.startswith("socket."):
        seen.append((event, *args[1:]))
sys.addaudithook(watch)
from mst import cli
model, key = {str(model)!r}, {str(tmp_path / "key")!r}
assert cli.main(["sign", model, "--generate-key", key]) == 0
given = ["--signature", model + ".sig", "--public-key", key + ".pub"]
assert cli.main(["model", "verify", model, *given]) == 0
# urllib3, which sigstore imports, looks whether there is IPv6 by binding to loopback.
loopback = ("socket.bind", ("::1", 0))
assert [each for each in seen if each[0] != "socket.__new__" and each != loopback] == []
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert "6 files, each as signed" in done.stdout


def test_sigstore_is_imported_only_where_something_is_signed_or_verified() -> None:
    names = "{'sigstore', 'model_signing', 'cryptography'}"
    script = (
        f"import sys, mst.cli.models, mst.cli.sign, mst.job\nassert not {names} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_line_says_what_belongs_together(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ["model", "verify", str(model)]

    assert cli.main(verify) == 2
    assert cli.main([*verify, "--signature", "x"]) == 2
    assert "belong together" in capsys.readouterr().err
    assert cli.main([*verify, "--signature", "x", "--public-key", "y"]) == 2
    assert cli.main(["model"]) == 2
    assert cli.main(["sign"]) == 2
    assert cli.main(["model", "manifest", str(model)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_nothing_is_verified_where_nothing_was_given(model: Path) -> None:
    assert verify_before_use(model, None, None) is None
    with pytest.raises(UsageError, match="belong together"):
        verify_before_use(model, "x", None)


def test_a_run_of_a_signed_model_is_verified_again_before_its_use(
    finished_run: Path, model: Path, key: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from mst.model.fingerprint import model_sha256
    from mst.request import TrainRequest

    signature = tmp_path / "model.sig"
    sign(model, key, signature)
    run = shutil.copytree(finished_run, tmp_path / "run")
    request = rundir.read_document(TrainRequest, run, rundir.REQUEST)
    signed = replace(request, model_signature=str(signature), model_public_key=str(public(key)))
    rundir.write_document(run, rundir.REQUEST, signed)
    rundir.update_manifest(run, model_path=str(model), model_sha256=model_sha256(model))

    assert of_run(run).weights == str(model)
    flip(model / "model.safetensors")  # the fingerprint reads headers only, and does not see it
    assert rundir.read_manifest(run).model_sha256 == model_sha256(model)
    with pytest.raises(MstError, match="is not what"):
        of_run(run)


def test_a_plan_is_made_only_of_the_model_that_was_signed(
    model: Path, key: Path, chat_rows: Path, tmp_path: Path
) -> None:
    from mst.job import prepare_job
    from mst.request import TrainRequest

    signature = tmp_path / "model.sig"
    signed = sign(model, key, signature)
    request = TrainRequest(
        model=str(model), dataset=(str(chat_rows),), device="cpu",
        model_signature=str(signature), model_public_key=str(public(key)),
    )  # fmt: skip
    job = prepare_job(request, os.environ)

    assert job.manifest.model_signature == signed.signature
    assert job.request.model_signature == str(signature)
    flip(model / "model.safetensors")
    with pytest.raises(ModelError, match="is not what"):
        prepare_job(request, os.environ)


def test_every_machine_of_a_job_verifies_its_own_copy(
    model: Path, key: Path, tmp_path: Path
) -> None:
    from mst.model.fingerprint import model_sha256
    from mst.shared_job import differs_here

    signature = tmp_path / "model.sig"
    sign(model, key, signature)
    checks = {
        "model_path": str(model), "model_sha256": model_sha256(model), "files": {},
        "model_signature": str(signature), "model_public_key": str(public(key)),
    }  # fmt: skip

    assert differs_here(checks) == ""
    flip(model / "model.safetensors")
    assert "is not what" in differs_here(checks)
    assert differs_here(checks | {"model_signature": None, "model_public_key": None}) == ""


@pytest.mark.parametrize("command", ["chat", "eval", "merge"])
def test_a_model_is_verified_before_it_is_loaded(
    command: str, model: Path, key: Path, chat_rows: Path, finished_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from mst.model.fingerprint import model_sha256

    sign(model, key, tmp_path / "model.sig")
    flip(model / "model.safetensors")
    run = shutil.copytree(finished_run, tmp_path / "run")
    rundir.update_manifest(run, model_path=str(model), model_sha256=model_sha256(model))
    known: dict[str, list[object]] = {
        "chat": [model, "--prompt", "hi"],
        "eval": [model, "--dataset", chat_rows],
        "merge": [run],
    }
    code = cli.main(
        [command, *map(str, known[command]), "--model-signature", str(tmp_path / "model.sig"),
         "--model-public-key", str(public(key))]
    )  # fmt: skip

    assert code == 1
    assert "is not what" in capsys.readouterr().err
    assert not (run / "merged").exists()
