"""Whatever is done to a log is found; a tail that is cut, against what was exported before."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from mst.errors import AuditError
from mst.seal.audit import merkle, place
from mst.seal.audit.event import digest, who
from mst.seal.audit.key import public_hex, read_public
from mst.seal.audit.upkeep import export
from mst.seal.audit.verification import read_export, verify

DOCUMENT = Path(__file__).resolve().parents[4] / "docs/audit.md"


def lines_of(directory: Path) -> dict[str, list[bytes]]:
    return {
        name: (directory / name).read_bytes().splitlines(keepends=True)
        for name in place.segments(directory)
    }


def put(directory: Path, files: dict[str, list[bytes]]) -> None:
    for name, lines in files.items():
        (directory / name).write_bytes(b"".join(lines))


def forged(lines: list[bytes], at: int) -> None:
    """Change an event, and mend the chain behind it as far as that goes without the key."""
    for index in range(at, len(lines)):
        event: dict[str, Any] = json.loads(lines[index])
        if index == at:
            event["facts"]["number"] = 999
        else:
            event["prev"] = digest(lines[index - 1][:-1])
        lines[index] = rfc8785.dumps(event) + b"\n"


def edit(files: dict[str, list[bytes]], kind: str, chance: random.Random) -> None:
    lines = files[chance.choice(list(files))]
    at = chance.randrange(len(lines))
    if kind == "byte":
        line = bytearray(lines[at])
        line[chance.randrange(len(line))] ^= 1 << chance.randrange(8)
        lines[at] = bytes(line)
    elif kind == "number":
        lines[at] = re.sub(rb'"seq":\d+', b'"seq":%d' % chance.randrange(10**6), lines[at])
    elif kind == "space":
        lines[at] = lines[at].replace(b":", b": ", 1)
    elif kind == "delete":
        del lines[at]
    elif kind == "swap":
        other = chance.choice([each for each in range(len(lines)) if each != at])
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "insert":
        from_file = files[chance.choice(list(files))]
        lines.insert(at, chance.choice(from_file))
    elif kind == "append":
        lines.append(chance.choice(lines[:-1]))
    elif kind == "forge":
        forged(lines, at)
    elif kind == "cut":
        del lines[max(1, at) :]
    elif kind == "tear":
        lines[-1] = lines[-1][: chance.randrange(len(lines[-1]))]
    elif kind == "drop":
        del files[chance.choice(list(files))]
    elif kind == "exchange":
        first, second = chance.sample(list(files), 2)
        files[first], files[second] = files[second], files[first]


KINDS = (
    "byte", "number", "space", "delete", "swap", "insert", "append", "forge", "cut", "tear", "drop",
    "exchange",
)  # fmt: skip


def test_a_thousand_changes_are_found(copied: Path) -> None:
    whole = lines_of(copied)
    chance = random.Random(6)
    missed = []

    assert verify(copied).problems == ()
    for number in range(1000):
        files = {name: list(lines) for name, lines in whole.items()}
        kind = KINDS[number % len(KINDS)]
        edit(files, kind, chance)
        if files == whole:  # the same number by chance
            continue
        put(copied, files)
        for name in whole.keys() - files.keys():
            (copied / name).unlink()
        try:
            if not verify(copied).problems:
                missed.append((number, kind))
        except AuditError:  # no file is left
            pass
        put(copied, whole)

    assert missed == []
    assert len(whole) >= 3
    assert sum(map(len, whole.values())) > 80


def test_a_cut_with_its_older_checkpoint_is_found_against_an_export_alone(
    directory: Path, write: Any, tmp_path: Path
) -> None:
    write(5)
    older = shutil.copytree(directory, tmp_path / "older")
    write(5)
    export(directory, tmp_path / "kept.json", who(""))
    checkpoint, public = read_export(tmp_path / "kept.json")
    write(3)

    assert verify(directory, public, checkpoint).problems == ()
    assert verify(older).problems == ()  # nothing in it can tell
    (problem,) = verify(older, public, checkpoint).problems
    assert "its end was cut off" in problem


def test_every_cut_of_whole_lines_is_found_against_an_export(copied: Path, tmp_path: Path) -> None:
    export(copied, tmp_path / "kept.json", who(""))
    checkpoint, public = read_export(tmp_path / "kept.json")
    whole = lines_of(copied)
    newest = list(whole)[-1]
    for keep in range(1, len(whole[newest])):
        put(copied, {newest: whole[newest][:keep]})

        assert any("exported" in each for each in verify(copied, public, checkpoint).problems)


def test_a_log_written_anew_with_another_key_is_found(
    directory: Path, write: Any, tmp_path: Path
) -> None:
    write(5)
    export(directory, tmp_path / "kept.json", who(""))
    kept = shutil.copy(directory / "key.pub", tmp_path)
    checkpoint, public = read_export(tmp_path / "kept.json")
    shutil.rmtree(directory)
    write(5)

    assert verify(directory).problems == ()
    assert len(verify(directory, public, checkpoint).problems) == 2
    assert "another key" in verify(directory, read_public(Path(kept))).problems[0]


@pytest.mark.parametrize("field", ["size", "root", "signature", "log", "host", "public_key"])
def test_an_exported_checkpoint_that_was_edited_is_refused(
    field: str, directory: Path, write: Any, tmp_path: Path
) -> None:
    write(1)
    value = export(directory, tmp_path / "kept.json", who(""))
    place_of = value["checkpoint"] if field == "host" else value["checkpoint"]["facts"]
    place_of[field] = 7 if field == "size" else "00" * 32
    (tmp_path / "kept.json").write_text(json.dumps(value))

    with pytest.raises(AuditError, match="holds no checkpoint that its key has signed"):
        read_export(tmp_path / "kept.json")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"checkpoint": {}}', "\x00\xff"])
def test_no_export_at_all_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text(text)

    with pytest.raises(AuditError, match="holds no checkpoint"):
        read_export(tmp_path / "kept.json")


def plain_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    k = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\x01" + plain_root(leaves[:k]) + plain_root(leaves[k:])).digest()


def test_the_root_is_that_of_rfc_6962() -> None:
    leaves = [merkle.leaf(b"%d" % number) for number in range(70)]
    frontier: list[bytes] = []
    for size, each in enumerate(leaves):
        assert merkle.root(frontier) == plain_root(leaves[:size])
        merkle.extend(frontier, size, each)

    # The empty tree and one empty entry, of Certificate Transparency's test vectors.
    assert merkle.root([]).hex().startswith("e3b0c44298fc1c149afbf4c8996fb924")
    assert merkle.leaf(b"").hex().startswith("6e340b9cffb37a989ca544e6bb780a2c")


def test_openssl_agrees_with_the_signature(directory: Path, write: Any, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    write(3)
    event = json.loads((directory / "000001.jsonl").read_bytes().splitlines()[-1])
    signature = event["facts"].pop("signature")
    (tmp_path / "message").write_bytes(rfc8785.dumps(event))
    (tmp_path / "signature").write_bytes(bytes.fromhex(signature))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(directory / "key.pub")]
    command += ["-rawin", "-in", "message", "-sigfile", "signature"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert "Verified Successfully" in done.stdout, done.stderr
    from mst.seal.audit.key import load

    assert read_public(directory / "key.pub") == public_hex(load(directory))


def documented_verifier() -> str:
    (found,) = re.findall(
        r"^```python\n(# verify\.py.*?)^```$", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return str(found)


@pytest.mark.parametrize("kind", ["", "byte", "space", "delete", "swap", "forge", "cut"])
def test_the_verifier_in_the_document_judges_as_ours(
    kind: str, copied: Path, tmp_path: Path
) -> None:
    files = lines_of(copied)
    if kind:
        edit(files, kind, random.Random(kind))
        put(copied, files)
    script = documented_verifier().replace('"audit"', repr(str(copied)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )

    assert "import mst" not in script
    assert "from mst" not in script
    assert (done.returncode == 0) == (not verify(copied).problems) == (not kind), done.stderr


def test_a_log_is_whole_while_it_is_written(directory: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom mst.seal.audit.event import who\n"
        "from mst.seal.audit.opening import open_directory\n"
        "log = open_directory(Path(sys.argv[1]), who(''))\nprint(flush=True)\n"
        "while True:\n    log.append('test.step', {})\n    log.checkpoint()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        found = [verify(directory)]
        deadline = time.monotonic() + 20
        while found[-1].events < 60 and time.monotonic() < deadline:
            found.append(verify(directory))
    finally:
        writer.kill()
        writer.communicate()

    assert {each.problems for each in found} == {()}
    assert found[-1].events >= 60
