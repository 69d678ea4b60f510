"""A file, or a script, is read for its settings; nothing of it is run or followed blindly."""

from __future__ import annotations

from pathlib import Path

import pytest

from mst.errors import UsageError
from mst.foreign.source import MOST_BYTES, read_source
from mst.foreign.translate import which_tool


def source_of(tmp_path: Path, text: str | bytes, name: str = "config.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "a.yaml", "is empty"),
        ("# nothing\n", "a.yaml", "holds nothing"),
        ("- a\n- b\n", "a.yaml", "holds a list"),
        ("just words", "a.yaml", "holds a str"),
        ("a: [1\nb: 2", "a.yaml", "line 2 is not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "a.yaml", "not YAML"),
        ("a: 2026-99-99", "a.yaml", "not YAML"),
        ('{"a": 1,,}', "a.json", "line 1 is not JSON"),
        (b"\xff\xfe\x00", "a.yaml", "not UTF-8"),
        (b"PK\x00\x01", "a.yaml", "is binary"),
        ("a: &x [1]\nb: *x\n", "a.yaml", "aliases"),
        ("a: " + "[" * 9000, "a.yaml", "too deeply"),
        ('{"a": ' + "[" * 100_000, "a.json", "too deeply"),
        ("a: " + "x" * MOST_BYTES, "a.yaml", "has at most"),
        ("echo hello\n", "a.sh", "no command that trains"),
        ("swift sft --model 'a\n", "a.sh", "quotation mark"),
        ("swift sft --model a\ntrl dpo --beta 1\n", "a.sh", "2 commands that train"),
        ("trl sft --config other.sh\n", "a.sh", "neither YAML nor JSON"),
        ("trl sft --config none.yaml\n", "a.sh", "cannot read"),
    ],
)
def test_what_is_no_configuration_is_refused(
    tmp_path: Path, text: str | bytes, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_source(source_of(tmp_path, text, name))


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot read"):
            read_source(path)


@pytest.mark.parametrize(
    ("line", "tool", "command", "values"),
    [
        ("swift sft --model m --lora_rank 8", "ms-swift", "sft", {"model": "m", "lora_rank": "8"}),
        ("swift rlhf --dataset a b --packing", "ms-swift", "rlhf",
         {"dataset": ["a", "b"], "packing": "true"}),
        ("swift sft --dataset a#2 'b #3' --seed 1 # it's said", "ms-swift", "sft",
         {"dataset": ["a#2", "b #3"], "seed": "1"}),
        ("python -m swift.cli.sft --model m", "ms-swift", "sft", {"model": "m"}),
        ("torchrun --nproc_per_node=2 /opt/swift/cli/pt.py --model m", "ms-swift", "pt",
         {"model": "m"}),
        ("llamafactory-cli train --stage sft --model_name_or_path m", "llama-factory", "train",
         {"stage": "sft", "model_name_or_path": "m"}),
        ("python src/train.py --stage sft", "llama-factory", "train", {"stage": "sft"}),
        ("deepspeed --num_gpus 2 src/train_bash.py --stage sft", "llama-factory", "train",
         {"stage": "sft"}),
        ("axolotl train --learning-rate=1e-4 ", "axolotl", "train", {"learning_rate": "1e-4"}),
        ("accelerate launch -m axolotl.cli.train", "axolotl", "train", {}),
        ("trl dpo --max_steps -1 > log.txt", "trl", "dpo", {"max_steps": "-1"}),
        ("python examples/scripts/sft.py --use_peft", "trl", "sft", {"use_peft": "true"}),
    ],
)  # fmt: skip
def test_a_command_is_taken_apart(
    tmp_path: Path, line: str, tool: str, command: str, values: dict[str, object]
) -> None:
    found = read_source(source_of(tmp_path, line, "run.sh"))

    assert (found.tool, found.command, found.values) == (tool, command, values)


def test_words_that_only_name_a_tool_are_no_command(tmp_path: Path) -> None:
    text = "pip install ms-swift trl\ncd axolotl && axolotl train --seed 3\nswift infer --model m\n"

    assert read_source(source_of(tmp_path, text, "run.sh")).values == {"seed": "3"}


def test_variables_and_sums_that_a_script_writes_out_are_put_in(tmp_path: Path) -> None:
    text = (
        "n=4\nswift sft --a $n --b ${n}0 --c $(expr 32 / $n / 2) --d $((n)) --e $(($n * 2))"
        " --f $HOME --g $(expr 1 / 0)\n"
    )
    found = read_source(source_of(tmp_path, text, "run.sh")).values

    assert (found["a"], found["b"], found["c"], found["e"]) == ("4", "40", "4", "8")
    assert found["f"] == "$HOME"
    assert "0" in found["g"][-1]


def test_a_command_overrides_the_file_that_it_names(tmp_path: Path) -> None:
    source_of(tmp_path, "stage: sft\nlearning_rate: 1.0e-5\n", "a.yaml")
    text = "FORCE_TORCHRUN=1 llamafactory-cli train a.yaml learning_rate=1e-3\n"
    found = read_source(source_of(tmp_path, text, "run.sh"))

    assert found.values == {"stage": "sft", "learning_rate": "1e-3"}
    assert found.environment == {"FORCE_TORCHRUN": "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: sft\nsequence_len: 8\n", "--from llama-factory|axolotl"),
        ("zzz: 1\n", "no key that tells the tool"),
        ("model: m\nlora_rank: 8\n", "options of mst"),
        ("compute_environment: LOCAL_MACHINE\n", "configuration of accelerate"),
        ("zero_optimization: {stage: 3}\n", "configuration of DeepSpeed"),
    ],
)
def test_a_file_of_no_tool_or_of_several_is_refused_with_the_candidates(
    tmp_path: Path, text: str, message: str
) -> None:
    path = source_of(tmp_path, text)

    with pytest.raises(UsageError) as caught:
        which_tool(read_source(path), "auto", path)
    assert message in str(caught.value)


def test_a_command_of_another_tool_than_asked_for_is_refused(tmp_path: Path) -> None:
    path = source_of(tmp_path, "trl sft --use_peft\n", "run.sh")

    with pytest.raises(UsageError, match="holds a command of trl"):
        which_tool(read_source(path), "axolotl", path)
