"""What a page may start: by id, under the directories that were named, and nothing beside it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mst import background, rundir
from mst.cli.options import Parser, add_train_options
from mst.cli.ui import _local_models
from mst.errors import UsageError
from mst.ui import choices
from mst.ui.asking import ActionRefused, Outside, Pipes, beside
from mst.ui.choices import (
    StartRequest,
    allowed_options,
    data_files,
    models,
    start_arguments,
)
from mst.ui.index import id_of
from mst.ui.job import LocalModel, Places
from mst.ui.starter import Starter, holder_of


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for each in ("runs", "data/deep", "models/tiny", "elsewhere"):
        (tmp_path / each).mkdir(parents=True)
    for each in ("data/rows.jsonl", "data/deep/more.csv.gz", "data/secret.jsonl.mst",
                 "data/notes.pdf", "elsewhere/other.jsonl", "models/tiny/config.json"):  # fmt: skip
        (tmp_path / each).write_text("{}")
    (tmp_path / "data/linked.jsonl").symlink_to(tmp_path / "elsewhere/other.jsonl")
    runs, data, models = ((str(tmp_path / each),) for each in ("runs", "data", "models"))
    return Places(runs, data, models)


def started(places: Places, **more: Any) -> tuple[str, ...]:
    return start_arguments(StartRequest(**{"name": "wards"} | more), places)


def test_models_and_data_are_those_under_the_directories_that_were_named(places: Places) -> None:
    assert [each.name for each in data_files(places.data)] == ["deep/more.csv.gz", "rows.jsonl"]
    assert [each.name for each in models(places)] == ["tiny"]


def test_a_model_of_the_local_places_can_be_chosen_once(places: Places, tmp_path: Path) -> None:
    there = [LocalModel("org/one", str(tmp_path / "elsewhere")),
             LocalModel("tiny", str(tmp_path / "models/tiny"))]  # fmt: skip
    more = replace(places, local_models=tuple(there))

    assert [each.name for each in models(more)] == ["tiny", "org/one"]
    chosen = id_of(tmp_path / "elsewhere")
    assert f"--model={tmp_path}/elsewhere" in started(more, model=chosen)
    with pytest.raises(UsageError, match="no such model"):
        started(places, model=chosen)


def test_the_local_models_are_those_that_the_list_shows_as_usable(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/org").mkdir(parents=True)
    (tmp_path / "home/org/tiny").symlink_to(tiny_model)
    (tmp_path / "home/broken").mkdir()
    (tmp_path / "home/broken/config.json").write_text("{")
    monkeypatch.setenv("MST_MODELS", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)

    assert _local_models() == (LocalModel("org/tiny", str(tmp_path / "home/org/tiny")),)


def test_a_request_becomes_the_command_line_that_a_person_would_type(
    places: Places, tmp_path: Path
) -> None:
    data, model = id_of(tmp_path / "data/rows.jsonl"), id_of(tmp_path / "models/tiny")
    options = {"lora_rank": "16", "tuner": "lora", "packing": True, "target_modules": ["q_proj"]}
    found = started(places, dataset=[data], model=model, options=options)

    assert found == (
        "train", f"--output-dir={tmp_path}/runs/wards", f"--model={tmp_path}/models/tiny",
        "--dataset", f"{tmp_path}/data/rows.jsonl", "--lora-rank=16", "--packing=true",
        "--target-modules", "q_proj", "--tuner=lora",
    )  # fmt: skip
    assert started(places) == ("train", f"--output-dir={tmp_path}/runs/wards")


def test_no_option_of_a_page_names_a_path_runs_code_or_opens_the_jail() -> None:
    allowed = set(allowed_options())

    assert {"learning_rate", "tuner", "task", "max_length", "num_train_epochs"} <= allowed
    assert not allowed & {
        "model", "dataset", "val_dataset", "dataset_info", "output_dir", "models_dir", "resume",
        "key_file", "passphrase_file", "pkcs11", "model_signature", "model_public_key", "template",
        "reward_funcs", "deepspeed", "offload_dir", "jail", "jail_reason", "allow_net",
        "nnodes", "node_rank", "master_addr", "master_port", "encrypt_run",
    }  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [{"name": ".."}, {"name": "../x"}, {"name": "/etc"}, {"name": ".hidden"}, {"name": "a/b"},
     {"name": "a\n"}, {"place": 7}, {"dataset": ["/etc/passwd"]}, {"dataset": ["../rows.jsonl"]},
     {"model": "tiny"}, {"options": {"jail": "off"}}, {"options": {"reward_funcs": ["x.py:f"]}},
     {"options": {"lora_rank": 0}}, {"options": {"tuner": "magic"}}, {"options": {"nothing": 1}},
     {"options": {"target_modules": ["q", "--jail=off"]}}, {"options": {"device": "--jail=off"}},
     {"options": {"columns": ["a=b", "-x"]}}],
)  # fmt: skip
def test_what_is_not_allowed_is_refused(places: Places, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        started(places, **more)


@pytest.mark.parametrize("asked", [["q_proj", "/etc/options.yaml"], "q_proj,/etc/options.yaml"])
def test_no_value_of_a_list_is_taken_for_a_file_of_options(places: Places, asked: Any) -> None:
    parser = Parser()
    add_train_options(parser)
    for more in ({}, {"tuner": "lora"}):
        found = parser.parse_args(started(places, options={"target_modules": asked} | more)[1:])

        assert found.config is None
        assert found.target_modules == ["q_proj", "/etc/options.yaml"]


@pytest.mark.parametrize("more", [{"command": "rm"}, {"name": 3}, {"name": ""}, {"place": "0"}])
def test_a_request_of_another_shape_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StartRequest(**{"name": "wards"} | more)


def test_a_file_that_leads_out_by_its_id_is_refused(places: Places, tmp_path: Path) -> None:
    for each in ("data/linked.jsonl", "elsewhere/other.jsonl", "data/secret.jsonl.mst"):
        with pytest.raises(UsageError, match="no such file"):
            started(places, dataset=[id_of(tmp_path / each)])


def test_the_process_outside_checks_what_it_is_asked(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, ...]] = []
    monkeypatch.setattr(background, "start", lambda arguments: begun.append(tuple(arguments)))
    starter = Starter(places)
    (tmp_path / "elsewhere/run.json").write_text("{}")
    asked = [
        b"", b"{", b"[]", b'{"do": "start"}', b'{"do": "run", "run": "x"}',
        b'{"do": "start", "request": {"name": "x", "options": {"jail": "off"}}}',
        b'{"do": "start", "request": {"name": "../x"}}',
        b'{"do": "stop", "run": "../elsewhere"}',
        f'{{"do": "stop", "run": "{id_of(tmp_path / "elsewhere")}"}}'.encode(),
        b'{"do": "__class__", "run": "x"}', b"[" * 100_000,
    ]  # fmt: skip

    assert all(set(starter.answer(each)) == {"error"} for each in asked)
    assert begun == []


def test_a_request_that_is_too_long_gets_no_second_answer(places: Places, tmp_path: Path) -> None:
    def ask(outside: Outside, do: str, **more: Any) -> str:
        with pytest.raises(ActionRefused) as refused:
            asyncio.run(outside.ask(do, **more))
        return str(refused.value)

    with beside(places, os.environ) as pipes:
        outside = Outside(Pipes(os.dup(pipes.requests), os.dup(pipes.answers)))
        # As long as a body of the page may be, and longer than one.
        longest = StartRequest(name="x", options={"device": "é" * 32_000, "lora_rank": 0})
        said = [
            ask(outside, "start", request=longest.model_dump()),
            ask(outside, "stop", run="x"),
            ask(outside, "start", request={"name": "x" * (1 << 19)}),
            ask(outside, "stop", run="x"),
        ]
        outside.close()

    assert "lora-rank" in said[0]
    assert "not there" in said[1]
    assert "has ended" in said[2]
    assert "has ended" in said[3]


def test_what_is_somebody_elses_alone_hides_nothing_else(places: Places, tmp_path: Path) -> None:
    for each in ("data/private", "models/private", "runs/private"):
        (tmp_path / each).mkdir(mode=0o000)
    # Root without its capabilities is kept out as others are.
    code = f"""
from pathlib import Path
from mst.seal.jail import kernel
from mst.ui.choices import data_files, models
from mst.ui.job import Places
from mst.ui.index import Index
kernel.drop_capabilities()
print(len(data_files({places.data!r})), len(models({places!r})),
      Index([Path({places.runs[0]!r})]).entries())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout == "2 1 ()\n", done.stderr


def test_a_directory_without_end_is_left_soon(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "_MOST_LOOKED_AT", 2)

    # Its files in their order: "deep" and what lies in it come first.
    assert [each.name for each in data_files(places.data)] == ["deep/more.csv.gz"]


def test_only_the_process_that_holds_a_runs_lock_is_stopped(tmp_path: Path) -> None:
    with rundir.take_lock(tmp_path):
        assert holder_of(tmp_path) == os.getpid()
        # The number of a process that has not got it open.
        (tmp_path / rundir.LOCK).write_text("1")
        assert holder_of(tmp_path) is None
    (tmp_path / rundir.LOCK).write_text(str(os.getpid()))
    assert holder_of(tmp_path) is None
    assert holder_of(tmp_path / "nowhere") is None
