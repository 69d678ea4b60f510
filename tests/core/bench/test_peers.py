"""Peers as rows: the same rows, adapters and losses beside mst, in the jail, and nothing left."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tests.core.bench.test_bench_command import bench
from tests.measured_cells import cell, failed, measured, repeat

from mst import cli, rundir
from mst.bench import peer_driver, peers
from mst.bench.cells import cells_of, of_peer
from mst.bench.figures import Prices
from mst.bench.lines import csv_text
from mst.bench.matrix import Matrix
from mst.bench.parity import with_parity
from mst.bench.peer_worker import rows_of_steps
from mst.bench.peers import (
    PeerAbsent,
    PeerRefused,
    check_model,
    check_plan,
    installed,
    peers_of,
)
from mst.bench.process import Ended
from mst.bench.result_file import read_results
from mst.bench.results import Measured, Results
from mst.bench.run_cell import outcome
from mst.bench.table import short
from mst.data.prepare import prepare
from mst.errors import EXIT_OUT_OF_MEMORY, EXIT_USAGE, UsageError
from mst.plan import Plan
from mst.request import TrainRequest

WITH_TRL = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="wants TRL, of the extra bench"
)
MATRIX = """
name: peers
models: [{model}]
dataset: {rows}
methods: [lora]
lengths: [64]
batches: [2]
devices: [cpu]
packing: false
steps: 2
warm_up: 1
repeats: 1
options: {{threads: 1, dtype: float32, learning_rate: 0.01}}
"""
# Before it becomes TRL's interpreter it tries to get out, and says so where it did.
SPY = """#!/bin/sh
{python} -c 'import socket; socket.create_connection(("127.0.0.1", {port}), 5)' && touch {out}
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def benched(
    tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A bench with TRL from this environment, and LLaMA-Factory from one that lacks it."""
    place = tmp_path_factory.mktemp("peers")
    (place / "matrix.yaml").write_text(MATRIX.format(model=tiny_model, rows=chat_rows))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        spy = place / "python"
        words = {"python": shlex.quote(sys.executable), "port": listening.getsockname()[1]}
        spy.write_text(SPY.format(**words, out=place / "got-out"))
        spy.chmod(0o755)
        done = bench(
            "matrix.yaml", "--output-dir", "out", "--keep-runs", "--peer", "trl", "llamafactory",
            "--peer-python", f"trl={spy}", cwd=place,
        )  # fmt: skip
    return place, done


def by_trainer(place: Path) -> dict[str, Measured]:
    return {each.cell.peer: each for each in read_results(place / "out").cells}


@WITH_TRL
def test_a_peer_is_a_row_of_its_own_beside_mst_with_its_losses(
    benched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place, done = benched
    rows = by_trainer(place)
    own, trl, missing = rows[""], rows["trl"], rows["llamafactory"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: each.status for name, each in rows.items()} == {
        "": "done", "trl": "done", "llamafactory": "absent",
    }, {each.reason for each in rows.values()}  # fmt: skip
    assert trl.loss_difference is not None
    # Products of float32 in another order; other rows or adapters would be off by tenths.
    assert trl.loss_difference < 1e-3
    assert any(note.startswith("parity:") for note in trl.notes)
    assert len(trl.repeats[0].losses) == 3
    assert trl.repeats[0].tokens == own.repeats[0].tokens
    assert trl.repeats[0].eval_loss == pytest.approx(own.repeats[0].eval_loss, abs=1e-3)
    assert trl.repeats[0].peak_memory_bytes > 2**27
    assert trl.flop_per_token == pytest.approx(own.flop_per_token, rel=0.05)
    assert set(trl.versions) >= {"trl", "torch", "transformers", "peft", "python"}
    assert f"tiny-llama, lora, 64, 2, trl {trl.versions['trl']}" in done.stdout
    assert f"llamafactory is not installed in the environment of {sys.executable}" in missing.reason


@WITH_TRL
def test_a_peer_is_in_the_jail_and_reaches_nobody(
    benched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place, _ = benched
    rows = by_trainer(place)

    assert rows["trl"].jail == rows[""].jail != ""
    assert not (place / "got-out").exists()


@WITH_TRL
def test_no_row_lies_in_a_file_of_a_peer(
    benched: tuple[Path, subprocess.CompletedProcess[str]], tiny_model: Path
) -> None:
    place, _ = benched
    run = place / "out/cells" / by_trainer(place)["trl"].id

    assert files_with_rows(run, tiny_model) == []


def files_with_rows(run: Path, model: Path) -> list[Path]:
    """Return the files of a peer's runs in which a row lies, as text or as tokens."""
    request = rundir.read_document(TrainRequest, run / "repeat-1", rundir.REQUEST)
    prepared = prepare(request, request.dataset, model, None)
    texts = [*(each.encode() for each in ("my card is", "my cash is", "the loan is"))]
    for row in prepared.train.examples[:8]:
        ids = list(row.input_ids)
        texts += [array(kind, ids).tobytes() for kind in "hiq"]
        texts.append(re.sub(r"[\[\]]", "", json.dumps(ids)).encode())
    told = {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}

    assert {"metrics.jsonl", "peer.json", "plan.json"} <= {each.name for each in told}
    return [each for each, data in told.items() if any(text in data for text in texts)]


@pytest.mark.parametrize("name", [each for each in peers.PEERS if each != "trl"])
def test_a_peer_in_an_environment_of_its_own_does_the_same_work(
    name: str, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    variable = f"MST_PEER_{name.upper().replace('-', '_')}"
    if variable not in os.environ:
        pytest.skip(f"wants {name}: name the interpreter of its environment in {variable}")
    (tmp_path / "matrix.yaml").write_text(MATRIX.format(model=tiny_model, rows=chat_rows))
    done = bench(
        "matrix.yaml", "--output-dir", "out", "--keep-runs", "--peer", name, "--peer-python",
        f"{name}={os.environ[variable]}", cwd=tmp_path,
    )  # fmt: skip
    rows = by_trainer(tmp_path)
    own, peer = rows[""], rows[name]

    assert peer.status == "done", peer.reason + done.stdout
    assert peer.loss_difference is not None
    assert peer.loss_difference < 1e-3
    assert peer.repeats[0].tokens == own.repeats[0].tokens
    assert peer.repeats[0].eval_loss == pytest.approx(own.repeats[0].eval_loss, abs=1e-3)
    assert peer.jail == own.jail != ""
    assert files_with_rows(tmp_path / "out/cells" / peer.id, tiny_model) == []


def test_a_cell_of_a_peer_is_another_cell_and_mst_s_own_keeps_its_id() -> None:
    both = cells_of(replace(Matrix(), procedure=cell(exports=("merged",)).procedure), ["trl"])
    own, trl = both

    assert own.id == cells_of(Matrix())[0].id
    assert own.id != trl.id
    assert (trl.peer, trl.procedure.exports, own.procedure.exports) == ("trl", (), ("merged",))


def test_parity_is_of_the_losses_of_each_step() -> None:
    losses = (3.0, 2.5, 2.0)
    own = measured(repeats=(repeat(losses=losses),))
    known = {own.id: own}

    def peer(*told: float) -> Measured:
        return measured(cell=of_peer(cell(), "trl"), repeats=(repeat(losses=told),))

    near, far = peer(3.0, 2.51, 2.0), peer(3.0, 2.5, 2.4)
    found, other = with_parity(near, known), with_parity(far, known)
    alone = with_parity(near, {own.id: failed("timeout", "hung")})
    old = with_parity(near, {own.id: measured()})

    assert (found.loss_difference, found.notes) == (
        0.01, ("parity: each step's loss is within 0.0100 of mst's",),
    )  # fmt: skip
    assert other.notes == (
        "NO PARITY: a step's loss is 0.4000 off mst's, so this may be other work",
    )
    assert (alone.loss_difference, "not done" in alone.notes[0]) == (None, True)
    assert (old.loss_difference, "measure it again" in old.notes[0]) == (None, True)
    lost = with_parity(peer(3.0, float("nan"), 2.0), known)

    assert (lost.loss_difference, lost.notes) == (None, ("NO PARITY: a step's loss is no number",))
    assert with_parity(own, known) == own
    assert short(replace(near, versions={"trl": "1.16.0"})) == "smollm2, lora, 512, 4, trl 1.16.0"
    assert ",trl 1.16.0," in csv_text(
        Results("a", "b", (replace(near, versions={"trl": "1.16.0"}),)), Prices({})
    )


@pytest.mark.parametrize(
    ("names", "pythons", "words"),
    [
        (["axolotl"], [], "no such peer. There are trl, llamafactory, ms-swift, unsloth"),
        (["trl"], ["trl"], "takes NAME=PYTHON, such as trl=/opt/trl/bin/python; found 'trl'"),
        (["trl"], ["llamafactory=x"], "llamafactory is not asked for. Add --peer llamafactory"),
    ],
)
def test_peers_that_can_not_be_had_are_named(
    names: list[str], pythons: list[str], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        peers_of(names, pythons, "python")

    assert words in str(caught.value)


def test_a_peer_without_an_interpreter_has_this_one() -> None:
    assert peers_of(["trl", "llamafactory"], ["trl=/opt/trl/bin/python"], "/here/python") == {
        "trl": "/opt/trl/bin/python", "llamafactory": "/here/python",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "words"),
    [(None, "can't be started"), ("#!/bin/sh\nexit 3\n", "does not answer as a Python")],
)
def test_an_interpreter_that_is_none_is_named(
    tmp_path: Path, script: str | None, words: str
) -> None:
    python = tmp_path / "python"
    if script:
        python.write_text(script)
        python.chmod(0o755)
    with pytest.raises(PeerAbsent, match=words):
        installed("trl", str(python))


def test_a_block_counts_the_tokens_of_its_rows_whatever_their_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = ModuleType("llamafactory.data.processor.processor_utils")
    # It can't be installed beside mst; its knapsack gives lengths, as this one does.
    vars(theirs)["greedy_knapsack"] = lambda lengths, capacity: [lengths[:2], lengths[2:]]
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    # 0 is "!" to Qwen2's tokenizer.
    rows = [([0, 5, 0], [-100, 5, 0]), ([7], [7]), ([0, 0], [-100, 0])]

    assert peer_driver.packed(rows, 5) == [
        ([0, 5, 0, 7, 0, 0], [-100, 5, 0, 7, -100, -100], 4),
        ([0, 0, 0, 0, 0, 0], [-100, 0, -100, -100, -100, -100], 2),
    ]


def test_packed_rows_and_odd_commands_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "matrix.yaml").write_text("name: packed")
    (tmp_path / "cell.json").write_text("{}")
    told = []
    for words in (["matrix.yaml", "--peer", "trl"], ["show", "x", "--peer", "trl"],
                  ["peer", "cell.json"], ["peer"]):  # fmt: skip
        log = ["--jail", "off", "--jail-reason", "a test", "--audit-log", str(tmp_path / "audit")]
        assert cli.main(["bench", *words, *log]) == EXIT_USAGE
        told.append(capsys.readouterr().err)

    assert "Write packing: false in the matrix" in told[0]
    assert "--peer goes with a matrix or quick, peer" in told[1]
    assert "cell.json holds no cell of `mst bench`" in told[2]
    assert "mst bench peer takes one file of a cell; found 0" in told[3]
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuner": "full"}, "with LoRA on plain weights"),
        ({"quantization": "nf4"}, "with LoRA on plain weights"),
        ({"backend": "ascend"}, "on cpu and cuda"),
        ({"torch_devices": ("cpu", "cpu")}, "on one device"),
        ({"weights_dtype": "bfloat16"}, "products and weights must have one dtype"),
        ({"optim": "adamw_8bit"}, "the optimizer must be adamw_torch"),
    ],
)
def test_what_a_peer_does_not_do_as_mst_does_is_refused(
    finished_run: Path, changes: dict[str, object], words: str
) -> None:
    plan = replace(
        rundir.read_document(Plan, finished_run, rundir.PLAN),
        weights_dtype="float32", compute_dtype="float32",
    )  # fmt: skip
    request = rundir.read_document(TrainRequest, finished_run, rundir.REQUEST)
    check_plan("trl", plan, request)
    with pytest.raises(PeerRefused, match=words):
        check_plan("trl", replace(plan, **changes), request)  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_not_run_by_a_peer_either(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    check_model("ms-swift", tmp_path)
    (tmp_path / file).write_text('{"auto_map": {"AutoConfig": "config.Config"}}')
    check_model("trl", tmp_path)
    with pytest.raises(PeerRefused, match=f"runs the code that {tmp_path}/{file} names"):
        check_model("ms-swift", tmp_path)


def test_an_epoch_that_ends_within_a_step_is_refused(finished_run: Path, tiny_model: Path) -> None:
    request = rundir.read_document(TrainRequest, finished_run, rundir.REQUEST)
    plan = rundir.read_document(Plan, finished_run, rundir.PLAN)
    prepared = prepare(request, request.dataset, tiny_model, None)
    steps = rows_of_steps(prepared, plan, request.seed)

    assert [len(each) for each in steps] == [8] * 4
    with pytest.raises(PeerRefused, match=r"step 4 of mst has 5 of 9 rows"):
        rows_of_steps(
            prepared, replace(plan, per_device_train_batch_size=9, total_steps=9), request.seed
        )


def test_an_error_within_a_peer_is_told_by_its_kind_and_place_alone() -> None:
    job = {"threads": "row: my card is lost"}
    handle = peers.handed_over(job)
    done = subprocess.run(
        peers.driver_command("trl", sys.executable, handle), pass_fds=(handle,),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    os.close(handle)

    assert done.returncode == 1
    assert re.fullmatch(
        r"PeerFailed: trl ended by \w+Error in \S*peer_driver\.py, line \d+\n", done.stderr
    ), done.stderr
    assert done.stdout == ""
    assert peer_driver.place_of(ImportError("No module named 'x'")) == ": No module named 'x'"
    assert peer_driver.ran_out(MemoryError())
    assert not peer_driver.ran_out(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        ("PeerAbsent", 1, "absent"),
        ("PeerRefused", 1, "refused"),
        ("PeerFailed", 1, "failed"),
        ("OutOfMemory", EXIT_OUT_OF_MEMORY, "out of memory"),
    ],
)
def test_how_a_peer_ended_is_its_rows_status(
    tmp_path: Path, error: str, code: int, status: str
) -> None:
    assert outcome(Ended(code, 1.0, False, error, "why", ""), tmp_path)[0] == status
