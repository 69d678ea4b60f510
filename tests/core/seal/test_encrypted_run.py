"""`--encrypt-run`: a run's weights are ciphertext, and commands that read them take its key."""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mst.chat import Sampling
from mst.cli import main
from mst.errors import EncryptionError
from mst.generate import generate
from mst.rundir import read_manifest, update_manifest
from mst.seal.keys.key_file import make_key_file, read_key_file
from mst.seal.keys.ring import NO_KEYS, KeyRing, ring_of
from mst.seal.keys.run_key import RUN_KEY, run_keys
from mst.serve.engine import Choice, EngineFailure, Prompt, Token
from mst.serve.job import EngineJob, prepare_engine
from mst.serve.loading import load_engine
from mst.training import tensor_files
from mst.tuned import load, of_run

if TYPE_CHECKING:
    import torch

CANARIES = 200
MARK = b"xkcanary"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two keys, and rows with a word each that stands nowhere else."""
    path = tmp_path_factory.mktemp("encrypted")
    for each in ("key", "other"):
        make_key_file(path / each)
    words = [f"zq{number * 7919 + 104729:07d}xkcanary{number:03d}w" for number in range(CANARIES)]
    rows = [{"prompt": f"where is {each}", "response": f"it is {each}"} for each in words]
    (path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def key(place: Path, name: str = "key") -> list[str]:
    return ["--key-file", str(place / name)]


def user_keys(place: Path) -> KeyRing:
    return KeyRing((read_key_file(place / "key"),))


def mst(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mst", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def training(place: Path, model: Path, run: Path, *more: object) -> list[object]:
    return [
        "train", "--model", model, "--dataset", place / "rows.jsonl", "--output-dir", run,
        "--device", "cpu", "--max-steps", 4, "--save-steps", 2, "--val-size", 8,
        "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 1, "--threads", 1,
        "--label-accuracy", "off", "--dtype", "float32", "--optim", "adamw_torch",
        "--learning-rate", 0.01, *more,
    ]  # fmt: skip


def trained(place: Path, model: Path, run: Path, *more: object) -> Path:
    done = mst(*training(place, model, run, *more))

    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="module")
def adapters(place: Path, tiny_model: Path) -> Path:
    """An encrypted run of LoRA. Copy it before a change."""
    return trained(place, tiny_model, place / "lora", "--encrypt-run", *key(place))


@pytest.fixture(scope="module")
def whole(place: Path, tiny_model: Path) -> Path:
    """An encrypted run of full tuning. Copy it before a change."""
    more = ("--tuner", "full", "--encrypt-run", *key(place))
    return trained(place, tiny_model, place / "full", *more)


@pytest.fixture(scope="module")
def plain(place: Path, tiny_model: Path) -> Path:
    """The run of LoRA, not encrypted."""
    return trained(place, tiny_model, place / "plain")


def tensors_of(directory: Path, keys: KeyRing) -> dict[str, torch.Tensor]:
    """Return all tensors under a directory, by file and name."""
    ending = tensor_files.file_name(tensor_files.ENDING, keys)
    return {
        f"{str(each.relative_to(directory)).removesuffix('.mst')}: {name}": tensor
        for each in directory.rglob(f"*{ending}")
        for name, tensor in tensor_files.read(each, keys).items()
    }


def assert_the_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    import torch

    assert one
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert torch.equal(each, other[name]), name


def assert_nothing_is_readable(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Look in every file of a run for rows, for safetensors, and for a piece of every tensor."""
    import torch
    from safetensors import SafetensorError, safe_open

    pieces = {}
    for name, each in tensors.items():
        data = bytes(each.reshape(-1).view(torch.uint8).numpy())
        piece = data[len(data) // 2 :][:24]
        if len(set(piece)) > 4:  # not one of zeros, which is found everywhere
            pieces[name] = piece
    assert len(pieces) > 10
    for path in (each for each in run.rglob("*") if each.is_file()):
        found = path.read_bytes()
        assert MARK not in found, path
        assert not [name for name, piece in pieces.items() if piece in found], path
        with pytest.raises(SafetensorError):
            safe_open(path, "pt")


@pytest.mark.slow
def test_the_search_finds_what_a_plain_run_holds(plain: Path) -> None:
    tensors = tensors_of(plain, NO_KEYS)

    with pytest.raises(AssertionError, match="safetensors"):
        assert_nothing_is_readable(plain, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_no_row_and_no_tensor_can_be_read_in_a_run(
    place: Path, plain: Path, tuner: str, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue("whole" if tuner == "full" else "adapters")
    tensors = tensors_of(run, run_keys(run, user_keys(place)))

    assert any(name.startswith("checkpoints/step-00000004/optimizer") for name in tensors)
    assert_nothing_is_readable(run, tensors)
    if tuner == "lora":
        assert_the_same(tensors, tensors_of(plain, NO_KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_eval_and_merge_read_a_run_with_its_key(
    place: Path, tmp_path: Path, tuner: str, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue("whole" if tuner == "full" else "adapters")
    judged = mst("eval", run, "--metric", "loss", "--device", "cpu", "--json", *key(place))

    assert judged.returncode == 0, judged.stderr
    figures = {each["name"]: each["value"] for each in json.loads(judged.stdout)["figures"]}
    expected = read_manifest(run).results["last_eval_loss"]
    assert figures["loss"] == pytest.approx(expected, rel=1e-4)

    merged = tmp_path / "merged"
    done = mst("merge", run, "--output-dir", merged, *key(place))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "the merged model is not encrypted" in done.stdout
    if tuner == "full":
        own = run_keys(run, user_keys(place))
        assert_the_same(tensors_of(merged, NO_KEYS), tensors_of(run / "model", own))


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_an_engine_serves_a_run_with_its_key(
    place: Path, tiny_model: Path, tuner: str, request: pytest.FixtureRequest
) -> None:
    import torch

    run: Path = request.getfixturevalue("whole" if tuner == "full" else "adapters")
    keys, ids = user_keys(place), [1, 320, 275, 201]
    model = load(of_run(run, None, keys), "float32", "sdpa", torch.device("cpu"), keys)
    expected = list(generate(model, ids, (), Sampling(max_new_tokens=8)))
    jobs: list[tuple[EngineJob, str | None]]
    jobs = [(prepare_engine(str(run), "cpu", os.environ, keys=keys), None)]
    if tuner == "lora":
        beside = {"own": str(run)}
        job = prepare_engine(str(tiny_model), "cpu", os.environ, adapters=beside, keys=keys)
        jobs.append((job, "own"))
    threads = torch.get_num_threads()
    try:
        for job, name in jobs:
            engine = load_engine(replace(job, dtype="float32", threads=1), keys)
            told: queue.Queue[Token | EngineFailure] = queue.Queue()
            engine.submit(Prompt(tuple(ids), Choice(8, temperature=0), name), told.put)
            found = [told.get(timeout=60) for _ in expected]
            engine.close()

            assert [each.id for each in found if isinstance(each, Token)] == expected
        with pytest.raises(EncryptionError):
            load_engine(jobs[0][0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_killed_run_leaves_ciphertext_and_ends_as_without_the_kill(
    place: Path, tiny_model: Path, tmp_path: Path
) -> None:
    more = ("--max-steps", 40, "--save-steps", 1, "--lora-dropout", 0.1, "--encrypt-run")
    quiet = trained(place, tiny_model, tmp_path / "quiet", *more, *key(place))
    run = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "mst", *map(str, training(place, tiny_model, run, *more)),
         *key(place)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*3/")) and time.monotonic() < deadline:
        time.sleep(0.002)
    words = words_of_session(child.pid)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    own = run_keys(run, user_keys(place))

    assert b"mst.training.worker" in words
    for each in (*own.key_files, *user_keys(place).key_files):
        assert each.hex().encode() not in words
        assert base64.b64encode(each) not in words
    assert read_manifest(run).status == "running"
    held = {
        name: tensor
        for step in run.glob("checkpoints/step-*")
        for name, tensor in tensors_of(step, own).items()
    }
    assert_nothing_is_readable(run, held)

    for wrong, said in (([], "no key was given"), (key(place, "other"), "the key is wrong")):
        done = mst("train", "--output-dir", run, "--resume", *wrong)
        assert done.returncode == 1
        assert said in done.stderr
        assert "reading" not in done.stdout  # the rows and the model
    done = mst("train", "--output-dir", run, "--resume", *key(place))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing after step" in done.stdout
    assert read_manifest(run).status == "done"
    assert_the_same(tensors_of(run, own), tensors_of(quiet, run_keys(quiet, user_keys(place))))


def words_of_session(session: int) -> bytes:
    """Return the command lines and environments of a session's processes."""
    found = b""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found += (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_two_processes_write_what_one_resumes(
    place: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="wants DeepSpeed")
    phrase = tmp_path / "phrase"
    phrase.write_text("five words that nobody guesses\n")
    phrase.chmod(0o600)
    named = ("--passphrase-file", phrase)
    run = trained(
        place, tiny_model, tmp_path / "two", "--nproc-per-node", 2, "--deepspeed", "zero3",
        "--per-device-train-batch-size", 2, "--tuner", "full", "--encrypt-run", *named,
    )  # fmt: skip
    own = run_keys(run, ring_of(None, str(phrase)))
    before = tensors_of(run, own)
    assert_nothing_is_readable(run, before)
    update_manifest(run, status="interrupted", finished=None, results={}, outputs={})
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints/step-00000004")
    resume = ("--resume", "--nproc-per-node", 1, "--deepspeed", "off", *named)
    done = mst("train", "--output-dir", run, *resume)

    assert done.returncode == 0, done.stdout + done.stderr
    after = tensors_of(run / "model", own)
    assert after
    for name, each in after.items():
        assert float((each - before[f"model/{name}"]).abs().max()) < 1e-3, name


@pytest.mark.slow
def test_a_run_opens_with_other_keys_after_one_file_was_rekeyed(
    place: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = shutil.copytree(adapters, tmp_path / "run"), tmp_path / "run.key"
    rekey = ["data", "rekey", str(run / RUN_KEY), *key(place)]
    assert main([*rekey, "--new-key-file", str(place / "other")]) == 0
    asked = ["chat", str(run), "--prompt", "hi", "--max-new-tokens", "1", "--device", "cpu"]

    assert mst(*asked, *key(place, "other")).returncode == 0
    assert main([*asked, *key(place)]) == 1
    assert "the key is wrong" in capsys.readouterr().err
    # The key itself can be had, and opens every file.
    own = ["data", "decrypt", str(run / RUN_KEY), "--output", str(file), *key(place, "other")]
    weights = run / "adapter/adapter_model.safetensors.mst"
    assert main(own) == 0
    assert main(["data", "verify", str(weights), "--key-file", str(file)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with a message of ours, and return the message."""
    capsys.readouterr()
    code = main([str(each) for each in arguments])
    error = capsys.readouterr().err

    assert code in (1, 2), error
    assert "Traceback" not in error
    return error


def test_a_run_without_a_key_is_not_begun(
    place: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = training(place, tiny_model, tmp_path / "run", "--encrypt-run")

    assert "--encrypt-run was given without a key" in refused(capsys, *begun)
    offload = ("--offload-dir", tmp_path, *key(place))
    assert "writes optimizer states as they are" in refused(capsys, *begun, *offload)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_reads_weights_wants_the_key_and_what_does_not_needs_none(
    place: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in (
        ("merge", whole),
        ("chat", whole, "--prompt", "hi"),
        ("eval", whole, "--metric", "loss", "--device", "cpu"),
    ):
        assert "no key was given" in refused(capsys, *command)
        assert "the key is wrong" in refused(capsys, *command, *key(place, "other"))
    error = refused(capsys, "train", "--model", whole / "model", "--dataset", place / "rows.jsonl")
    assert "is of an encrypted run" in error

    for keyless in (
        ("runs", "show", whole),
        ("runs", "list", place),
        ("runs", "compare", whole, whole),
        ("audit", "pack", whole, "--output", tmp_path / "pack.zip"),
        ("model", "manifest", whole / "model"),
    ):
        assert main([str(each) for each in keyless]) == 0, keyless


@pytest.mark.slow
@pytest.mark.parametrize("change", ["bit", "plain", "no key"])
def test_a_changed_result_is_refused(
    place: Path,
    adapters: Path,
    plain: Path,
    tmp_path: Path,
    change: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(adapters, tmp_path / "run")
    weights = run / "adapter/adapter_model.safetensors.mst"
    changes: dict[str, Callable[[], object]] = {
        "bit": lambda: weights.write_bytes(weights.read_bytes()[:-9] + bytes(9)),
        "plain": lambda: shutil.copytree(plain / "adapter", run / "adapter", dirs_exist_ok=True),
        "no key": (run / RUN_KEY).unlink,
    }
    changes[change]()
    error = refused(capsys, "chat", run, "--prompt", "hi", *key(place))

    assert ("which holds its key" if change == "no key" else "is damaged") in error
