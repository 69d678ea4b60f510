"""Code that fails with a row in its hands: templates, libraries, plugins, users' functions.

What it raises, warns of and logs is searched for canaries as in `test_canaries`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.canaries import STEM, canaries, leaks, leaks_in

from mst.cli import main
from mst.rundir import read_manifest

ROWS = 24


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every place that a command may write to, made anew: by name, and in the environment."""
    made = {name: tmp_path / name for name in ("work", "tmp", "cache", "home", "data", "code")}
    for path in made.values():
        path.mkdir()
    monkeypatch.chdir(made["work"])
    for name, place in (("TMPDIR", "tmp"), ("XDG_CACHE_HOME", "cache"), ("HF_HOME", "cache"),
                        ("HOME", "home")):  # fmt: skip
        monkeypatch.setenv(name, str(made[place]))
    return made


@pytest.fixture
def rows(places: dict[str, Path]) -> Path:
    """Good rows, whose every text is a canary."""
    secrets, path = canaries(), places["data"] / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"query": next(secrets), "response": next(secrets)}) + "\n"
            for _ in range(ROWS)
        ),
        encoding="utf-8",
    )
    return path


def nothing_found(places: dict[str, Path], said: str, *wanted: str) -> None:
    assert leaks(said.encode()) == [], said
    assert leaks_in([path for name, path in places.items() if name not in ("data", "code")]) == []
    assert [each for each in wanted if each not in said] == [], said


def flags(rows: Path, model: Path, **more: object) -> list[str]:
    options = {"dataset": rows, "model": model, "device": "cpu", "threads": 1, **more}
    return [
        text
        for name, each in options.items()
        for text in (f"--{name.replace('_', '-')}", str(each))
    ]


TEMPLATES = (
    "{{ raise_exception(messages[0].content) }}",
    "{{ raise_exception('this row: ' + messages[0].content) }}",
    "{{ messages[0].content + 1 }}",
    "{{ messages[0].content.a.b }}",
    "{{ {}[messages[0].content].a }}",
    "{{ messages[0].content | int(default='x') / 0 }}",
    "{{ messages[0].content.encode('ascii') }}",
    "{{ messages[0].content.format(1, 2) + '{}'.format() }}",
    "{{ messages[0].content | attr('x') | abs }}",
    "{{ strftime_now(messages[0].content) + 1 }}",
    "{% include messages[0].content %}",
    "{{ dict([messages[0].content]) }}",
    "{{ messages[0].content * 99999999 }}",
    "{% for i in range(99999999) %}{{ messages[0].content }}{% endfor %}",
    "{{ messages[0].content }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_on_a_row(
    template: str, tiny_model: Path, places: dict[str, Path], rows: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = places["code"] / "t.jinja"
    path.write_text(template, encoding="utf-8")
    code = main(["plan", *flags(rows, tiny_model, template=path)])
    out, err = capfd.readouterr()

    assert code == 1
    nothing_found(places, out + err, "template")


class Quoting(Exception):
    """What a library raises: the row in its text, its attributes, its notes and its causes."""

    def __init__(self, row: object) -> None:
        super().__init__(row)
        self.doc = row
        self.__notes__ = [str(row)]


def _fail(*arguments: Any, **named: Any) -> Any:
    text = f"{arguments} {named}"
    try:
        raise KeyError(text)
    except KeyError as error:
        raise Quoting(text) from error


@pytest.mark.parametrize("raised", [Quoting, SystemExit])
@pytest.mark.parametrize(
    "place",
    [
        "mst.data.text_files._parsed",
        "mst.data.formats.make_row",
        "mst.data.tokens.TextTokenizer.encode_batch",
        "mst.data.sandbox.rendered",
    ],
)
def test_a_library_that_fails_on_a_row(
    place: str, raised: type[BaseException], tiny_model: Path, places: dict[str, Path], rows: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    texts = rows.read_text(encoding="utf-8")

    def fail(*arguments: Any, **named: Any) -> Any:
        try:
            _fail(*arguments, **named, rows=texts)
        except Quoting as error:
            raise raised(str(error)) from error

    monkeypatch.setattr(place, fail)
    codes = [main(["plan", *flags(rows, tiny_model)])]
    codes += [main(["data", "check", str(rows), "--model", str(tiny_model), "--json"])]
    out, err = capfd.readouterr()

    assert 1 in codes
    nothing_found(places, out + err)


def test_pyarrow_and_csv_quote_nothing_that_they_cannot_cast(
    places: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    secret = next(canaries())
    path = places["data"] / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"text": secret}]), path)

    class Batch:
        columns = ()

        def to_pylist(self) -> Any:
            return pyarrow.array([secret]).cast(pyarrow.int64())

    monkeypatch.setattr("mst.data.tables._parquet", lambda path, plain: iter([Batch()]))
    code = main(["data", "scan", str(path)])
    out, err = capfd.readouterr()

    assert code == 1
    nothing_found(places, out + err, "ArrowInvalid")


def ran(
    arguments: Sequence[str], places: dict[str, Path], memory_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with this test's own package within reach."""

    def limit() -> None:
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    path = os.pathsep.join([str(places["code"]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "mst", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, preexec_fn=limit,
    )  # fmt: skip


LEAKY = '''
"""An objective that says what it learns from, in each way that Python has."""

import asyncio, atexit, logging, sys, threading, warnings

from mst.hookspecs import hookimpl
from mst.objective import Objective


class Finalized:
    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise ValueError(self.text)


TEXTS = []


def tell(text):
    logging.warning("a literal")
    logging.warning("an argument: %s", text)
    logging.getLogger("transformers").error(f"text: {text}")
    warnings.warn(text)
    thread = threading.Thread(target=lambda: {}[text], name=text)
    thread.start()
    thread.join()
    Finalized(text)
    atexit.register(lambda: {}[text])


def counts(example):
    TEXTS.append(repr(example.row.messages[0].content))
    return {"tokens": 1.0}


def loss(micro):
    text = str(TEXTS)
    tell(text)
    try:
        {}[text]
    except KeyError as error:
        problem = ValueError(text)
        problem.__notes__ = [text]
        if sys.version_info >= (3, 11):
            raise ExceptionGroup(text, [problem, OSError(5, text, text)]) from error
        raise problem from error


@hookimpl
def mst_objective_name():
    return "leaky"


@hookimpl
def mst_objective(request):
    return Objective(
        name="leaky", lacks=lambda row: "", counts=counts, loss=loss,
        sequences=lambda example: (example,), usable=lambda example: True,
    )
'''


def plug_in(folder: Path) -> None:
    """Lay a package there as pip would have installed it."""
    (folder / "mst_leaky.py").write_text(LEAKY, encoding="utf-8")
    facts = folder / "mst_leaky-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mst-leaky\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[mst]\nleaky = mst_leaky\n")


def training(rows: Path, model: Path, run: Path, **more: object) -> list[str]:
    return flags(
        rows, model, output_dir=run, max_steps=2, val_size=4, label_accuracy="off",
        per_device_train_batch_size=2, gradient_accumulation_steps=1, **more,
    )  # fmt: skip


def test_an_objective_that_tells_what_it_learns_from(
    tiny_model: Path, places: dict[str, Path], rows: Path
) -> None:
    plug_in(places["code"])
    run = places["work"] / "run"
    done = ran(["train", *training(rows, tiny_model, run, task="leaky")], places)
    manifest = read_manifest(run)

    assert done.returncode == 1, done.stderr
    assert manifest.status == "failed"
    nothing_found(places, done.stdout + done.stderr, "mst_leaky.py", "a literal", "UserWarning at")


def test_an_objective_that_is_not_made(
    tiny_model: Path, places: dict[str, Path], rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mst.registry import PluginError, Registry
    from mst.request import TrainRequest
    from mst.training.objectives import find_objective

    text = rows.read_text(encoding="utf-8")

    class Hooks:
        def mst_objective(self, request: TrainRequest) -> Any:
            return _fail(text)

    registry: Any = Registry((), {}, {}, {"leaky": Hooks()})  # type: ignore[dict-item]
    with pytest.raises(PluginError, match=r"raised Quoting in .*, line") as caught:
        find_objective(TrainRequest(task="leaky"), registry)

    said = "".join(map(repr, (caught.value, caught.value.__cause__, caught.value.__context__)))
    nothing_found(places, said + str(caught.value))


def test_a_reward_function_that_raises_a_row(
    tiny_model: Path, places: dict[str, Path], rows: Path
) -> None:
    path = places["code"] / "judge.py"
    path.write_text(
        "import logging, warnings\n"
        "def judge(prompts, completions, references):\n"
        "    logging.error(f'bad: {prompts}')\n"
        "    warnings.warn(str(prompts))\n"
        "    raise ValueError(f'{prompts} {references}')\n"
    )
    more = {"reward_funcs": f"{path}:judge", "num_generations": 2, "max_completion_length": 4}
    done = ran(["grpo", *training(rows, tiny_model, places["work"] / "run", **more)], places)

    assert done.returncode == 1
    nothing_found(places, done.stdout + done.stderr, "judge.py", "raised ValueError in line 5")


def test_a_metric_that_raises_a_row(tiny_model: Path, places: dict[str, Path], rows: Path) -> None:
    path = places["code"] / "metric.py"
    path.write_text(
        "def metric(predictions, references):\n    raise KeyError(f'{predictions} {references}')\n"
    )
    arguments = ["eval", str(tiny_model), "--dataset", str(rows), "--metric-file", f"{path}:metric"]
    done = ran([*arguments, "--device", "cpu", "--max-new-tokens", "2", "--limit", "2"], places)

    assert done.returncode == 1
    nothing_found(places, done.stdout + done.stderr, "raised KeyError in line 2")


def test_a_machine_whose_memory_runs_out(places: dict[str, Path]) -> None:
    path = places["data"] / "a.json"
    with path.open("w", encoding="utf-8") as file:
        file.write(f'[{{"text": "{STEM} {"x" * 2000}"}}')
        for _ in range(100_000):
            file.write(f',\n{{"text": "{STEM} {"x" * 2000}"}}')
        file.write("]")
    done = ran(["data", "scan", str(path)], places, 400 << 20)

    assert done.returncode == 1
    nothing_found(places, done.stdout + done.stderr, "MemoryError", "memory ran out")


def test_a_run_from_its_start_to_its_end(
    tiny_model: Path, places: dict[str, Path], rows: Path
) -> None:
    run = places["work"] / "run"
    more = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "learning_rate": 0.01, "val_size": 4}
    done = ran(["train", *flags(rows, tiny_model, output_dir=run, **more)], places)

    assert done.returncode == 0, done.stderr
    assert list(run.glob("checkpoints/*"))
    nothing_found(places, done.stdout + done.stderr)
