from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mst.data.rows import DataSet
from mst.errors import MstError

DATA = Path(__file__).resolve().parents[2] / "data"

# In every row that a test expects to be refused; no error may hold it.
SECRET = "Frau Müller 王小明 +49-151"


def everything_said(error: BaseException | None) -> str:
    """All that a traceback printer, a logger or a debugger would find in an exception chain."""
    said = []
    while error is not None:
        said += [str(error), repr(error.args), repr(vars(error))]
        said += [repr(getattr(error, name, "")) for name in ("doc", "object", "message")]
        error = error.__cause__ or error.__context__
    return "\n".join(said)


@pytest.fixture
def refuses() -> Callable[..., str]:
    def check(call: Callable[[], object], *needles: str) -> str:
        with pytest.raises(MstError) as caught:
            call()
        message = str(caught.value)
        said = everything_said(caught.value)

        assert [needle for needle in needles if needle not in message] == [], message
        for part in (SECRET, "Müller", "王小明", "+49", "M\\xfc"):
            assert part not in said
        return message

    return check


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def demo() -> DataSet:
    import mst
    from mst.data.formats import read

    assert mst.__file__ is not None
    folder = Path(mst.__file__).parent / "demo/banking77"
    return read([str(folder / "train.jsonl"), str(folder / "test.jsonl")])


@pytest.fixture(scope="session")
def crosswoz() -> DataSet:
    from mst.data.formats import read

    return read([str(DATA / "crosswoz_sample.jsonl")])


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three model directories that hold a tokenizer and a template, no weights."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(DATA / "tokenizers/minimind", root / "minimind")
    shutil.copytree(DATA / "tokenizers/minimind", root / "smollm2")
    shutil.copy(DATA / "templates/smollm2.jinja", root / "smollm2/chat_template.jinja")
    (root / "qwen3").mkdir()
    shutil.copy(DATA / "tokenizers/qwen3/tokenizer_config.json", root / "qwen3")
    packed = (DATA / "tokenizers/qwen3/tokenizer.json.gz").read_bytes()
    (root / "qwen3/tokenizer.json").write_bytes(gzip.decompress(packed))
    return {path.name: path for path in root.iterdir()}
