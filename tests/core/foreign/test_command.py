"""`mst config import`: YAML that `mst plan` takes, a report, and no secret in either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mst import cli
from mst.cli.options import Parser, add_train_options, train_request
from mst.foreign.report import to_yaml
from mst.foreign.source import Source
from mst.foreign.translate import TOOLS, translate
from mst.request import TrainRequest

CONFIGS = Path(__file__).resolve().parents[2] / "data" / "configs"
FILES = (
    "ms_swift.sh", "ms_swift_args.json", "llama_factory/sft.yaml", "axolotl.yml", "trl.sh",
    "trl.yaml",
)  # fmt: skip


def request_of(path: Path) -> TrainRequest:
    """Return what `mst plan` makes of a YAML file."""
    parser = Parser(prog="mst plan", allow_abbrev=False)
    add_train_options(parser)
    return train_request(parser.parse_args([str(path)]))


@pytest.mark.parametrize("name", FILES)
def test_mst_plan_takes_what_was_translated(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mst.yaml"
    code = cli.main(["config", "import", str(CONFIGS / name), "--output", str(output)])
    request = request_of(output)

    assert code == 0
    assert yaml.safe_load(output.read_text())
    for key, value in yaml.safe_load(output.read_text()).items():
        there = getattr(request, key)
        assert (list(there) if isinstance(there, tuple) else there) == value
    assert f"mst plan {output}" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_printed(
    name: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["config", "import", str(CONFIGS / name), *flags])
    out, err = capsys.readouterr()

    assert out
    assert "planted-secret" not in out + err


def test_the_report_begins_with_what_changes_the_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = cli.main(["config", "import", str(CONFIGS / "ms_swift.sh")])
    out, err = capsys.readouterr()

    assert code == 0
    assert err.splitlines()[0] == "not carried over; the tuned model will differ"
    assert "system: mst adds no system message" in err
    assert "NPROC_PER_NODE" in err
    assert yaml.safe_load(out)["lora_alpha"] == 32


def test_strict_fails_where_the_result_changes_and_only_there(tmp_path: Path) -> None:
    same = tmp_path / "same.yaml"
    same.write_text("adapter: lora\nlora_target_linear: true\nbase_model: m\nwandb_name: a\n")
    other = tmp_path / "other.yaml"
    other.write_text(same.read_text() + "neftune_noise_alpha: 5\n")

    assert cli.main(["config", "import", str(same), "--strict"]) == 0
    assert cli.main(["config", "import", str(other), "--strict"]) == 1
    assert cli.main(["config", "import", str(other)]) == 0


def test_an_unknown_key_is_named_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("stage: sft\nfinetuning_type: lora\ncutof_len: 99\n")
    code = cli.main(["config", "import", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)

    assert code == 0
    assert found["unknown"] == [{"key": "cutof_len", "hint": "Did you mean cutoff_len?"}]
    assert cli.main(["config", "import", str(file), "--strict"]) == 1


def test_a_file_is_replaced_only_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mst.yaml"
    output.write_text("mine")
    command = ["config", "import", str(CONFIGS / "trl.yaml"), "--output", str(output)]

    assert cli.main(command) == 2
    assert output.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 0
    assert request_of(output).max_length == 512


def test_bad_input_ends_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("- 1\n")

    assert cli.main(["config", "import", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5000), st.floats(), st.text(max_size=6),
    st.sampled_from(["auto", "all", "none", "lora", "constant", "zero3", "4", "1e-4", "dpo"]),
)  # fmt: skip
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=2),
)
# What the translations themselves read, beside what their tables name.
READ = """
    stage finetuning_type lora_target quantization_bit dataset eval_dataset max_samples
    deepspeed optim optimizer learning_rate lr_scheduler_type lr_scheduler warmup_steps
    warmup_ratio max_steps num_train_epochs per_device_train_batch_size
    gradient_accumulation_steps save_strategy save_steps eval_steps logging_steps
    save_total_limit bf16 fp16 torch_dtype dtype gradient_checkpointing datasets
    test_datasets pretraining_dataset rl adapter load_in_4bit chat_template batch_size
    micro_batch_size loss_scale target_modules tuner_type quant_bits quant_method
    columns attn_impl flash_attn rlhf_type beta loss_type pref_loss packing dataset_name
    report_to use_peft lora_target_modules
"""


@pytest.mark.parametrize("tool", TOOLS)
@settings(max_examples=40, deadline=None)
@given(found=st.data())
def test_any_values_come_out_as_options_that_parse(
    tool: str, found: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = [*READ.split(), *TOOLS[tool].renamed]
    values: dict[str, Any] = found.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=8))
    translation = translate(Source(values), TOOLS[tool], CONFIGS)
    file = tmp_path_factory.getbasetemp() / f"{tool}.yaml"
    file.write_text(to_yaml(translation, tool), encoding="utf-8")

    assert isinstance(request_of(file), TrainRequest)
