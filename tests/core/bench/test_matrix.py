"""The matrix file: its cells, the command line of each, and every way to write it wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.measured_cells import cell

from mst.bench.cells import cells_of, train_arguments
from mst.bench.matrix import QUICK, keys, read_matrix
from mst.bench.predict import forecasts, train_request
from mst.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
WHOLE = """
name: wards
models: [default, /models/qwen]
dataset: rows.jsonl
methods: [lora, zero2, {name: r64, tuner: lora, lora_rank: 64, nproc-per-node: 2}]
lengths: [256, 1024]
batches: [2, auto]
devices: [cpu, cuda]
exports: [merged]
serving: [1, 8]
steps: 5
options: {learning_rate: 0.001, target_modules: [q_proj, v_proj]}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_matrix_is_the_product_of_its_axes(tmp_path: Path) -> None:
    cells = cells_of(read_matrix(written(tmp_path, WHOLE)))

    assert len(cells) == len({each.id for each in cells}) == 2 * 3 * 2 * 2 * 2
    assert [each.device for each in cells] == ["cpu"] * 24 + ["cuda"] * 24
    assert {each.devices for each in cells if each.method == "r64"} == {2}
    assert cells[0].procedure.exports == ("merged",)


def test_a_cell_is_a_command_line_of_mst_train(tmp_path: Path) -> None:
    made = cells_of(read_matrix(written(tmp_path, WHOLE)))[-2]
    line = train_arguments(made, tmp_path / "run")
    request = train_request(made)

    assert " ".join(line).startswith(f"--output-dir {tmp_path}/run --dataset rows.jsonl")
    assert "--target-modules q_proj v_proj --tuner lora --lora-rank 64" in " ".join(line)
    assert (request.max_steps, request.max_length, request.packing) == (7, 1024, True)
    assert (request.per_device_train_batch_size, request.gradient_accumulation_steps) == (2, 1)
    assert (request.model, request.device, request.on_oom) == ("/models/qwen", "cuda", "stop")
    assert request.target_modules == ("q_proj", "v_proj")


def test_the_embedded_rows_come_without_the_rate_of_the_demo(tmp_path: Path) -> None:
    request = train_request(cell())

    assert [Path(each).is_file() for each in request.dataset] == [True]
    assert request.learning_rate is None
    assert f"--dataset {request.dataset[0]}" in " ".join(train_arguments(cell(), tmp_path))


def test_the_same_cell_has_the_same_id_however_often_it_is_measured() -> None:
    asked = cell()

    assert asked.id == cell(repeats=9, exports=("gptq",), method="mine").id
    assert len({asked.id, cell(length=1024).id, cell(seed=1).id, cell(device="cuda").id}) == 4


def test_quick_is_a_matrix_that_every_machine_has() -> None:
    assert {each.device for each in cells_of(QUICK)} == {"auto"}
    assert {each.model for each in cells_of(QUICK)} == {"default"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modles: [default]", "unknown key 'modles'. Did you mean models?"),
        ("methods: [lroa]", "no method is called 'lroa'. Did you mean lora?"),
        ("methods: [{name: x, lora_rnak: 4}]", "unknown option 'lora_rnak'. Did you mean"),
        ("methods: [{tuner: lroa}]", "takes one of auto, lora, qlora, full; found 'lroa'"),
        ("options: {max_length: 4}", "max_length can't be set here; it is set by lengths"),
        ("options: {cutoff_len: 4}", "cutoff_len can't be set here; it is set by lengths"),
        ("options: {output_dir: x}", "it is set by --output-dir"),
        ("options: {nnodes: 2}", "nnodes can't be set here; it is set by nothing: see devices"),
        ("options: {nproc_per_node: }", "nproc_per_node has no value"),
        ("warm-up: 1\nwarm_up: 2", "warm_up is there twice, with - and with _"),
        ("name: ../../etc", "has no / and begins with no dot; found '../../etc'"),
        ("options: [a]", "takes lines of `option: value`"),
        ("models: []", "models is empty, so the matrix has no cell"),
        ("lengths:", "lengths is empty, so the matrix has no cell"),
        ("lengths: [long]", "takes a whole number from 2 on, not 'long'"),
        ("lengths: [true]", "takes a whole number from 2 on, not True"),
        ("batches: [0]", "batches (rows, or auto) takes a whole number from 1 on, not 0"),
        ("serving: [1, 1]", "serving has 1 twice"),
        ("exports: [merged, merged]", "exports has merged twice"),
        ("repeats: 0", "takes a whole number from 1 on, not 0"),
        ("timeout_seconds: .inf", "takes seconds above 0, not inf"),
        ("packing: maybe", "takes true or false, not 'maybe'"),
        ("name: []", "takes a text, not []"),
        ("lengths: [8, 9, 8]", "the cell (default, lora, 8, auto, auto) is there twice"),
        ("methods: [lora, {name: mine, tuner: lora}]", "first as (default, lora, 512, auto, auto)"),
        ("[1, 2]", "holds no matrix"),
        ("", "holds no matrix"),
        ("a: [", "is not YAML"),
        ("a: &b [1]\nc: *b", "YAML aliases"),
    ],
)
def test_a_matrix_that_is_wrong_is_refused_before_anything_runs(
    tmp_path: Path, text: str, words: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_matrix(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_matrix_that_is_not_there_names_what_else_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file.*quick, show, merge and peak"):
        read_matrix(tmp_path / "quik")


@pytest.mark.parametrize("name", ["bench.yaml", "bench-npu.yaml"])
def test_the_matrices_of_ci_can_be_run(name: str) -> None:
    found = read_matrix(ROOT / "ci" / name)

    assert {each.devices for each in cells_of(found)} == {1}
    assert set(found.devices) <= {"cpu", "simchip", "npu"}


def test_the_matrix_of_gpu_machines_can_be_planned_for_them() -> None:
    found = read_matrix(ROOT / "ci/bench-gpu.yaml")
    largest = [each for each in cells_of(found) if (each.length, each.batch) == (2048, "auto")]
    by_devices = {
        count: [each for each in largest if each.devices == count] for count in (1, 2)
    }  # fmt: skip
    one = forecasts(by_devices[1], ["a100-80gb", "rtx-3090"], os.environ)
    two = forecasts(by_devices[2], ["a100-80gb:2"], os.environ)

    assert len(cells_of(found)) == 5 * 2 * 2
    assert [each.cell.method for each in two] == ["zero2 on 2", "zero3 on 2"]
    assert [each.reason for each in (*one, *two)] == [""] * 8
    assert all(each.forecast and each.forecast.tokens_per_second for each in (*one, *two))
    assert {each.setting.world_size for each in two if each.setting} == {2}


def test_the_matrix_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    found = read_matrix(written(tmp_path, text.partition("```yaml\n")[2].partition("```")[0]))

    assert len(cells_of(found)) == 2 * 5 * 2 * 3 * 2


def test_every_key_of_a_matrix_is_documented() -> None:
    text = (ROOT / "docs/bench.md").read_text(encoding="utf-8")

    assert [each for each in keys() if f"`{each}`" not in text] == []
