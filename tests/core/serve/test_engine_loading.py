"""From what a user names to an engine: runs, merged models, adapters of other runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.serve.conftest import CPU, ask, random_model
from tests.core.serve.test_engine_adapters import saved_adapter

from mst.chat import Sampling
from mst.data.tokens import load_tokenizer
from mst.errors import ModelError, UsageError
from mst.generate import generate
from mst.serve.continuous import ContinuousEngine
from mst.serve.job import EngineJob, prepare_engine
from mst.serve.loading import load_engine
from mst.training.adapters import load_model
from mst.tuned import load, of_run

IDS = [1, 320, 275, 201, 1200, 99, 7, 7]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """An engine sets torch's threads for its process, which is the tests' here."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prepared(target: Path, **options: Any) -> EngineJob:
    job = prepare_engine(str(target), "cpu", os.environ, **options)
    return replace(job, dtype="float32", threads=1)


def answers(job: EngineJob, names: list[str | None], **options: Any) -> list[list[int]]:
    """Return the greedy answers of a mixed batch."""
    engine = load_engine(job, **options)
    try:
        heard = [ask(engine, IDS, 10, adapter=name) for name in names]
        return [each.ids() for each in heard]
    finally:
        engine.close()


def expected(model: Any) -> list[int]:
    return list(generate(model, IDS, (), Sampling(max_new_tokens=10)))


def changed(run: Path, path: Path) -> Path:
    """Copy a run with another adapter: a fresh one of the same shape."""
    from safetensors.torch import load_file, save_file

    from mst.training.sealed_directory import write_sealed

    shutil.copytree(run, path)
    weights = load_file(path / "adapter/adapter_model.safetensors")
    torch.manual_seed(5)
    other = {name: torch.randn_like(each) * 0.3 for name, each in weights.items()}
    files = {each.name: each.read_bytes() for each in (path / "adapter").iterdir()}
    shutil.rmtree(path / "adapter")

    def fill(directory: Path) -> None:
        for name, content in files.items():
            if name.endswith((".json", ".md")) and name != "manifest.json":
                (directory / name).write_bytes(content)
        save_file(other, directory / "adapter_model.safetensors")

    write_sealed(path / "adapter", fill)
    return path


def test_a_run_answers_beside_another_and_their_base(
    finished_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = changed(finished_run, tmp_path / "other")
    base = load_model(tiny_model, "float32", "sdpa", CPU).eval()
    tuned = [load(of_run(run), "float32", "sdpa", CPU) for run in (finished_run, other)]
    job = prepared(tiny_model, adapters={"one": str(finished_run), "two": str(other)})
    run = prepared(finished_run, adapters={"two": str(other)})

    assert answers(job, [None, "one", "two", "one"]) == [
        expected(each) for each in (base, tuned[0], tuned[1], tuned[0])
    ]
    assert answers(run, [None, "two", None]) == [
        expected(each) for each in (tuned[0], tuned[1], tuned[0])
    ]
    assert job.context == 512


def test_a_merged_run_answers_as_the_run(finished_run: Path, merged: Path) -> None:
    assert (
        answers(prepared(merged), [None, None])
        == [expected(load_model(merged, "float32", "sdpa", CPU).eval())] * 2
    )


def test_adapters_answer_in_one_batch_in_bfloat16(finished_run: Path) -> None:
    job = replace(prepared(finished_run), dtype="bfloat16")
    said: list[str] = []
    found = answers(job, [None, None, None], say=said.append)

    assert [len(each) for each in found] == [10, 10, 10]
    assert said == []


def test_an_adapter_in_a_directory_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model, "float32", "sdpa", CPU).eval()
    whole = saved_adapter(model, tmp_path / "a", 1, target_modules=["q_proj", "up_proj"])
    job = prepared(tiny_model, adapters={"a": str(tmp_path / "a")})

    assert answers(job, ["a", None]) == [expected(whole), expected(model)]


def test_dora_is_served_alone(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model, "float32", "sdpa", CPU).eval()
    whole = saved_adapter(model, tmp_path / "a", 1, target_modules=["q_proj"], use_dora=True)
    plain = prepared(tiny_model)
    job = replace(plain, model=replace(plain.model, adapter=str(tmp_path / "a")))
    saved_adapter(model, tmp_path / "b", 1, target_modules=["q_proj"])
    other = replace(plain.model, adapter=str(tmp_path / "b"))

    assert answers(job, [None, None]) == [expected(whole)] * 2
    assert len(answers(replace(job, dtype="bfloat16"), [None])[0]) == 10
    with pytest.raises(ModelError, match="use_dora"):
        load_engine(replace(job, adapters={"b": other}))


def test_a_quantized_base_answers_as_chat_does(finished_run: Path) -> None:
    pytest.importorskip("bitsandbytes")
    job = prepared(finished_run)
    tuned = replace(job.model, quantization="nf4", weights_dtype="float32")
    model = load(tuned, "float32", "sdpa", CPU)

    assert answers(replace(job, model=tuned), [None, None]) == [expected(model)] * 2


def test_adapters_of_another_base_are_refused(
    finished_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    random_model("llama", vocab_size=6400).save_pretrained(other)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / each, other)

    with pytest.raises(ModelError, match="Serve it on its own base"):
        prepared(other, adapters={"one": str(finished_run)})
    with pytest.raises(UsageError, match="neither a run nor"):
        prepared(other, adapters={"one": str(tmp_path)})


def test_adapters_of_unlike_quantizations_are_refused(finished_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(finished_run, tmp_path / "other")
    plan = json.loads((other / "plan.json").read_text())
    (other / "plan.json").write_text(json.dumps(plan | {"quantization": "nf4"}))

    with pytest.raises(ModelError, match="different quantizations"):
        prepared(finished_run, adapters={"two": str(other)})


def test_what_can_not_run_in_a_batch_is_said(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "mamba"
    random_model("mamba", "eager", vocab_size=6400).save_pretrained(path)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / each, path)
    config = json.loads((path / "config.json").read_text())
    del config["max_position_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    job = prepared(path)

    assert [len(each) for each in answers(job, [None, None], say=said.append)] == [10, 10]
    assert len(said) == 1
    assert "passes of its own" in said[0]
    assert "LinearAttentionLayer" in said[0]
    assert job.context == 32_768


def test_an_engine_knows_its_tokenizers_stop(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    engine: ContinuousEngine = load_engine(prepared(tiny_model))
    try:
        schema = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],'
        tokens = ask(
            engine, IDS, 40, json_schema=schema + ' "additionalProperties": false}'
        ).tokens()
    finally:
        engine.close()

    assert tokens[-1].id in tokenizer.eos_token_ids
    assert json.loads(tokenizer.decode([each.id for each in tokens[:-1]]))["a"] in (1, 2)
