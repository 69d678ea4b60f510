"""Flags and YAML keys come from one place, and unknown ones are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mst.cli.options import Parser, add_train_options, given_options, refuse_unknown, train_request
from mst.errors import UsageError
from mst.request import TrainRequest, fields

CANONICAL = [
    "--model",
    "--dataset",
    "--device",
    "--output-dir",
    "--max-steps",
    "--num-train-epochs",
    "--per-device-train-batch-size",
    "--gradient-accumulation-steps",
    "--max-length",
    "--learning-rate",
    "--lora-rank",
    "--lora-alpha",
    "--target-modules",
    "--val-size",
    "--save-steps",
    "--seed",
    "--resume",
]


def parsed(*arguments: str) -> tuple[TrainRequest, frozenset[str]]:
    parser = Parser(prog="mst train", allow_abbrev=False)
    add_train_options(parser)
    args, unknown = parser.parse_known_args(arguments)
    refuse_unknown(parser, unknown)
    return train_request(args), given_options(args)


@pytest.mark.parametrize("flag", CANONICAL)
def test_the_canonical_flags_exist(flag: str) -> None:
    assert flag[2:].replace("-", "_") in fields()


def test_flags_take_dashes_underscores_and_peers_names() -> None:
    for flag in ("--lora-rank", "--lora_rank", "--lora_r", "--lora-r"):
        assert parsed(flag, "4")[0].lora_rank == 4


def test_flags_override_yaml_which_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-3\nlora_rank: 4\ncutoff_len: 99\ndataset: [a.jsonl, b.csv]\n"
        "gradient_checkpointing: on\nlabel_accuracy: off\nuse_dora: true\n"
    )
    request, given = parsed(str(file), "--lora-rank", "16")

    assert (request.learning_rate, request.lora_rank, request.max_length) == (1e-3, 16, 99)
    assert request.dataset == ("a.jsonl", "b.csv")
    assert (request.gradient_checkpointing, request.label_accuracy) == ("on", "off")
    file.write_text("gradient_checkpointing: 12\n")
    assert parsed(str(file))[0].gradient_checkpointing == "12"
    assert request.use_dora
    assert request.lora_alpha == TrainRequest().lora_alpha
    assert "lora_alpha" not in given
    assert {"lora_rank", "max_length", "use_dora"} <= given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin-rate", "1"], "Did you mean --learning-rate"),
        (["--max-steps", "many"], "--max-steps takes a whole number, not 'many'"),
        (["--max-steps", "0"], "--max-steps must be at least 1; found 0"),
        (["--learning-rate", "nan"], "finite"),
        (["--learning-rate", "-1"], "must be above 0"),
        (["--tuner", "lorra"], "one of auto, lora, qlora, full; found 'lorra'. Did you mean lora"),
        (["--use-dora", "maybe"], "true or false"),
        (
            ["--gradient-checkpointing", "0"],
            "auto, on, off, or a whole number from 1 on; found '0'",
        ),
        (["--gradient-checkpointing", "some"], "or a whole number from 1 on; found 'some'"),
        (["--max-steps"], "expected one argument"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
        (["no-such.yaml"], "cannot read the options in no-such.yaml"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parsed(*arguments)

    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", "unknown key 'learnin_rate'. Did you mean learning_rate"),
        ("max_steps: [1]", "takes one value"),
        ("max_steps: true", "takes a number"),
        ("- a\n- b", "holds a list"),
        ("a: b: c", "line 1 is not YAML: mapping values are not allowed here"),
        ("{a: 1", "expected ',' or '}', but got '<stream end>'"),
        ("a: \tb", r"found character '\t' that cannot start any token"),
        ("seed: 2024-13-45", "is not YAML: malformed"),
    ],
)
def test_what_is_wrong_in_a_yaml_is_said(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        parsed(str(file))

    assert message in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "!Smith has asthma",
        "!<tag:Smith> has asthma",
        "!Smith! has asthma",
        "*Smith has asthma",
        "- &Smith asthma\n- &Smith cough",
        "%YAML 1.1\n%TAG !Smith! tag:x\n%TAG !Smith! tag:x\n---\nasthma",
        "Mr Smith, 44: has asthma",
        "? [Mr Smith, 44]\n: asthma",
    ],
)
def test_rows_that_were_taken_for_options_are_not_quoted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.txt"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        parsed(str(file))

    assert "Smith" not in str(raised.value)
    assert "asthma" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "resume"), [("resume: true", "last"), ("resume: false", None), ("resume: x", "x")]
)
def test_peers_boolean_resume(tmp_path: Path, text: str, resume: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)

    assert parsed(str(file))[0].resume == resume


def test_columns_may_be_a_mapping_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("columns:\n  frage: prompt\n  antwort: response\non_bad_row: skip\n")
    request = parsed(str(file))[0]

    assert request.columns == ("frage=prompt", "antwort=response")
    assert request.on_bad_row == "skip"
