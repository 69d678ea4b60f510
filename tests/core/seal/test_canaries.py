"""A thousand canaries through every way in which data can be bad: none turns up anywhere.

Searched raw, escaped, in base64, in hexadecimal and as UTF-16: standard output and error, and each
file of the working directory, the temporary one, the cache and the home.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.canaries import STEM, canaries, leaks, leaks_in

from mst.cli import main

# In each case; a row that is bad in another way would hide what the case is about, so all but the
# last rows are good ones.
EACH = 40
Secrets = Iterator[str]


def pair(secrets: Secrets) -> dict[str, Any]:
    return {"query": next(secrets), "response": next(secrets)}


def turns(secrets: Secrets, *more: dict[str, Any]) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": next(secrets)},
        {"role": "assistant", "content": next(secrets)},
    ]
    return {"messages": [*messages, *more]}


def lines(*rows: Any) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()) + b"\n"
        for row in rows
    )


def good(secrets: Secrets, count: int = EACH // 2 - 1) -> list[Any]:
    return [pair(secrets) for _ in range(count)]


def calls(secrets: Secrets) -> dict[str, Any]:
    def call(name: str) -> dict[str, Any]:
        function = {"name": next(secrets), "arguments": {"a": next(secrets)}}
        return {"role": "assistant", "content": None,
                "tool_calls": [{"id": name, "type": "function", "function": function}]}  # fmt: skip

    result = {"role": "tool", "content": next(secrets)}
    cycle = (result | {"tool_call_id": "b"}, call("b"), result | {"tool_call_id": "a"})
    return turns(secrets, {"role": "user", "content": "x"}, call("a"), *cycle)


def all_turns(secrets: Secrets, *bad: dict[str, Any]) -> bytes:
    return lines(*(turns(secrets) for _ in range(EACH // 2 - 1)), *bad)


def table(secrets: Secrets, last: str) -> bytes:
    rows = "".join(f"{next(secrets)},{next(secrets)}\n" for _ in range(EACH // 2 - 1))
    return f"query,response\n{rows}{last}".encode()


def nested(secrets: Secrets, depth: int) -> bytes:
    return b'{"query": ' + b"[" * depth + json.dumps(next(secrets)).encode() + b"]" * depth + b"}"


def parquet(secrets: Secrets, spoil: Callable[[bytes], bytes]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    sink = pyarrow.BufferOutputStream()
    rows = good(secrets, EACH // 2)
    writer.write_table(pyarrow.Table.from_pylist(rows), sink, compression="none")
    return spoil(sink.getvalue().to_pybytes())


def images(secrets: Secrets) -> dict[str, Any]:
    return {"messages": turns(secrets)["messages"], "images": [f"https://{next(secrets)}/a.png"]}


Build = Callable[[Secrets], bytes]
# File's name, then its bytes; the list of bad input, and more ways for a library to fail.
BAD: dict[str, tuple[str, Build]] = {
    "mixed shapes": ("a.jsonl", lambda s: lines(*good(s), turns(s))),
    "a mark of byte order": ("a.jsonl", lambda s: b"\xef\xbb\xbf" + lines(*good(s), {next(s): 1})),
    "UTF-16": ("a.jsonl", lambda s: lines(*good(s)).decode().encode("utf-16")),
    "no UTF-8": (
        "a.jsonl",
        lambda s: lines(*good(s), f'{{"query": "{next(s)}'.encode() + b'\xff"}'),
    ),
    "GB18030": ("a.csv", lambda s: table(s, "").decode().encode("gb18030")),
    "NUL": ("a.jsonl", lambda s: lines(*good(s), f'{{"query": "{next(s)}\0"}}'.encode())),
    "a line too long": ("a.jsonl", lambda s: lines(*good(s), {"query": next(s) * 60_000})),
    "nested arrays": ("a.jsonl", lambda s: lines(*good(s), nested(s, 100))),
    "nested too deeply": ("a.jsonl", lambda s: lines(*good(s), nested(s, 100_000))),
    "calls in a circle": ("a.jsonl", lambda s: all_turns(s, calls(s))),
    "empty answers": ("a.jsonl", lambda s: lines(*good(s), {"query": next(s), "response": ""})),
    "an unknown role": (
        "a.jsonl",
        lambda s: all_turns(s, turns(s, {"role": next(s), "content": next(s)})),
    ),
    "no content": (
        "a.jsonl",
        lambda s: all_turns(s, turns(s, {"role": "user", "content": None, "x": next(s)})),
    ),
    "two answers": (
        "a.jsonl",
        lambda s: all_turns(s, turns(s, {"role": "assistant", "content": next(s)})),
    ),
    "fields of other types": (
        "a.jsonl",
        lambda s: lines(*good(s), {"query": [next(s)], "response": {next(s): 1}}),
    ),
    "an image's address": ("a.jsonl", lambda s: lines(*(images(s) for _ in range(EACH // 3 + 1)))),
    "cut JSON": ("a.jsonl", lambda s: lines(*good(s), f'{{"query": "{next(s)}'.encode())),
    "broken JSON": ("a.json", lambda s: json.dumps(good(s)).encode()[:-9]),
    "JSON of no rows": ("a.json", lambda s: json.dumps({next(s): good(s)}).encode()),
    "a number too long": ("a.jsonl", lambda s: lines(*good(s), b'{"query": ' + b"9" * 5000 + b"}")),
    "unknown columns": (
        "a.jsonl",
        lambda s: lines(*({"foo": next(s), "bar": next(s)} for _ in range(EACH // 2))),
    ),
    "no header": ("a.csv", lambda s: table(s, "").partition(b"\n")[2]),
    "a header twice": ("a.csv", lambda s: (next(s) + ",").encode() * 2 + table(s, "")),
    "cells too many": ("a.csv", lambda s: table(s, f"{next(s)},{next(s)},{next(s)}\n")),
    "an open quote": ("a.csv", lambda s: table(s, f'"{next(s)},{next(s)}\n')),
    "semicolons": ("a.csv", lambda s: table(s, "").replace(b",", b";")),
    "a bomb": (
        "a.jsonl.gz",
        lambda s: gzip.compress(lines(*good(s), {"query": next(s) + "0" * (70 << 20)}), 1),
    ),
    "cut gzip": ("a.jsonl.gz", lambda s: gzip.compress(lines(*good(s)), 0)[:-50]),
    "no gzip": ("a.jsonl.gz", lambda s: lines(*good(s))),
    "no parquet": ("a.parquet", lambda s: lines(*good(s))),
    "cut parquet": ("a.parquet", lambda s: parquet(s, lambda data: data[:-20])),
    "torn parquet": (
        "a.parquet",
        lambda s: parquet(s, lambda data: data[:200] + b"\xff" * 300 + data[500:]),
    ),
    "no arrow": ("a.arrow", lambda s: b"ARROW1\0\0" + lines(*good(s))),
}
COMMANDS = (
    ("data", "check", "--json"),
    ("data", "scan"),
    ("plan",),
    ("plan", "--on-bad-row", "skip"),
    ("plan", "--columns", "foo=query", "bar=response", "--streaming", "true"),
)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every place that a command may write to, made anew: by name, and in the environment."""
    made = {name: tmp_path / name for name in ("work", "tmp", "cache", "home", "data")}
    for path in made.values():
        path.mkdir()
    monkeypatch.chdir(made["work"])
    for name, place in (("TMPDIR", "tmp"), ("XDG_CACHE_HOME", "cache"), ("HF_HOME", "cache"),
                        ("TORCHINDUCTOR_CACHE_DIR", "cache"), ("HOME", "home")):  # fmt: skip
        monkeypatch.setenv(name, str(made[place]))
    return made


def nothing_found(
    places: dict[str, Path], capfd: pytest.CaptureFixture[str], said: str = ""
) -> None:
    out, err = capfd.readouterr()

    assert leaks((out + err).encode()) == [], out + err
    assert leaks_in([path for name, path in places.items() if name != "data"]) == []
    assert said in out + err


def test_the_search_finds_each_form() -> None:
    secret = next(canaries())
    forms = (
        secret, json.dumps(secret), repr(secret.encode()), ascii(secret), secret[:9], secret[-9:],
        *(base64.b64encode(b"x" * pad + secret.encode()).decode() for pad in range(3)),
        secret.encode().hex(), secret.upper(), str(list(secret.encode())),
    )  # fmt: skip

    assert [form for form in forms if not leaks(form.encode())] == []
    assert leaks(secret.encode("utf-16"))
    assert not leaks(b"nothing here")


def test_there_are_a_thousand() -> None:
    secrets = canaries()
    for case, (_, build) in BAD.items():
        if case != "a bomb":  # which takes a second to pack
            build(secrets)
    number = int(next(secrets)[len(STEM) :][:5])

    assert number > 1000


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_quoted_nowhere(
    case: str,
    tiny_model: Path,
    places: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mst.data import text_files
    from mst.data.shapes import values

    # As the bounds of 16 and 64 million are, and faster to reach.
    monkeypatch.setattr(values, "_MAX_CHARACTERS", 1 << 20)
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 2 << 20)
    name, build = BAD[case]
    path = places["data"] / name
    path.write_bytes(build(canaries()))
    codes = []
    for command in COMMANDS:
        if "--streaming" in command and path.suffix != ".jsonl":
            continue  # refused by the name alone
        data = [str(path)] if command[0] == "data" else ["--dataset", str(path)]
        model = ["--model", str(tiny_model)] if command[1:2] != ("scan",) else []
        more = ["--device", "cpu"] if command[0] == "plan" else []
        codes.append(main([*command, *data, *model, *more]))

    assert 1 in codes
    nothing_found(places, capfd)
