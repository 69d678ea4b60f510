"""An encrypted file is read as its original, and refused when a byte of it differs."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst.data.formats import Reading, iter_rows, read
from mst.data.line_index import index_lines, line_at, line_number
from mst.data.refusals import Refusals
from mst.errors import EncryptionError, MstError
from mst.seal.container.cipher import Segments
from mst.seal.container.layout import MAGIC, TAG_BYTES, Header, fixed_bytes, read_front
from mst.seal.container.output import whole_file
from mst.seal.container.reader import PlainBytes
from mst.seal.container.row_index import BLANK, RowIndex
from mst.seal.container.writer import encrypt
from mst.seal.keys.key_file import make_key_file
from mst.seal.keys.ring import ring_of
from mst.seal.keys.wrapping import PassphraseWay

SEGMENT_BYTES = 4096
EDITS = 1000


def reading(key_file: Path) -> Reading:
    return Reading(keys=ring_of(str(key_file), None))


def test_rows_are_those_of_the_original(rows: Path, sealed: Path, key_file: Path) -> None:
    plain, found = read([str(rows)]), read([str(sealed)], reading(key_file))

    assert [(each.number, each.messages) for each in found.rows] == [
        (each.number, each.messages) for each in plain.rows
    ]
    assert found.files[0].kind == "jsonl"
    assert found.files[0].key.startswith("key-file ")
    assert plain.files[0].key == ""


def test_a_choice_of_rows_is_taken(sealed: Path, key_file: Path) -> None:
    assert len(read([f"{sealed}#5"], reading(key_file)).rows) == 5
    assert len(read([f"{sealed}#~7"], reading(key_file)).rows) == 7


def test_the_index_leads_to_the_same_lines(rows: Path, sealed: Path, key_file: Path) -> None:
    plain = index_lines(rows, Refusals())
    found = index_lines(sealed, Refusals(), ring_of(str(key_file), None))

    assert (found.starts, found.blanks) == (plain.starts, plain.blanks)
    for row in (119, 0, 7, 60):
        assert line_at(found, row) == line_at(plain, row)
        assert line_number(found, row) == line_number(plain, row)


def edited(data: bytes, front: int, draw: random.Random) -> bytes:
    """Return a file with one thing done to it that an attacker or a disk might do."""
    kind = draw.choice(("flip", "flip", "header", "cut", "append", "swap", "drop", "twice", "zero"))
    step = SEGMENT_BYTES + TAG_BYTES
    count = (len(data) - front) // step
    first, second = draw.sample(range(count), 2)
    a, b = front + first * step, front + second * step
    place = draw.randrange(
        len(MAGIC) if kind == "header" else 0, front if kind == "header" else len(data)
    )
    changed = bytearray(data)
    if kind in ("flip", "header"):
        changed[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "append":
        changed += draw.randbytes(draw.choice((1, 16, step)))
    elif kind == "swap":
        changed[a : a + step], changed[b : b + step] = data[b : b + step], data[a : a + step]
    elif kind == "drop":
        del changed[a : a + step]
    elif kind == "twice":
        changed[a:a] = data[a : a + step]
    else:
        changed[place : place + 8] = bytes(8)
    return bytes(changed)


def test_a_thousand_edits_are_refused_before_a_row_is_used(sealed: Path, key_file: Path) -> None:
    data, draw = sealed.read_bytes(), random.Random(7)
    how = reading(key_file)
    with sealed.open("rb") as stream:
        front = read_front("it", stream).end
    target = sealed.with_name("changed.jsonl.mst")
    tried = 0
    while tried < EDITS:
        changed = edited(data, front, draw)
        if changed == data:
            continue
        tried += 1
        target.write_bytes(changed)
        with pytest.raises(EncryptionError):
            next(iter_rows(str(target), how))
        if tried % 10 == 0:
            with pytest.raises(EncryptionError):
                index_lines(target, Refusals(), how.keys)


def test_another_key_opens_nothing(sealed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    name = make_key_file(other)
    with pytest.raises(EncryptionError, match=f"does not open with key-file {name}"):
        read([str(sealed)], reading(other))
    with pytest.raises(EncryptionError, match="no key was given"):
        read([str(sealed)])


def test_a_segment_that_rots_later_is_refused_when_it_is_reached(
    sealed: Path, key_file: Path
) -> None:
    found = index_lines(sealed, Refusals(), ring_of(str(key_file), None))
    data = bytearray(sealed.read_bytes())
    data[len(data) // 2] ^= 1
    sealed.write_bytes(data)

    with pytest.raises(EncryptionError, match="segment"):
        [line_at(found, row) for row in range(len(found.starts))]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192])
def test_every_size_comes_back(size: int, tmp_path: Path, key_file: Path) -> None:
    from mst.seal.keys.key_file import read_key_file
    from mst.seal.keys.wrapping import KeyFileWay

    data = random.Random(size).randbytes(size)
    (tmp_path / "a.txt").write_bytes(data)
    path = tmp_path / "a.txt.mst"
    ways = (KeyFileWay(read_key_file(key_file)),)
    with (tmp_path / "a.txt").open("rb") as source, whole_file(path) as target:
        encrypt(source, target, ".txt", ways, segment_bytes=SEGMENT_BYTES)
    with ring_of(str(key_file), None).open(path) as found:
        found.verify()

        assert b"".join(found.segment(each) for each in range(found.count)) == data
        assert io.BufferedReader(PlainBytes(found)).read() == data


def test_tables_are_read_from_any_place_and_over_segments(tmp_path: Path, key_file: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from mst.cli import main

    # The one batch of the arrow file takes several segments.
    table = pa.table({"prompt": [f"q {n}" for n in range(9000)], "response": ["yes"] * 9000})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=500)
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as w:
        w.write_table(table)
    for name in ("t.parquet", "t.arrow"):
        assert main(["data", "encrypt", str(tmp_path / name), "--key-file", str(key_file)]) == 0
        found = read([f"{tmp_path / name}.mst"], reading(key_file)).rows

        assert [each.messages for each in found] == [
            each.messages for each in read([str(tmp_path / name)]).rows
        ]


@pytest.mark.parametrize("suite", ["AES-256-GCM", "SM4-GCM"])
def test_both_suites_open_and_refuse(suite: str) -> None:
    header = Header(suite, 4096, bytes(32), bytes(7), ".txt", 5)
    cipher = Segments(bytes(32), header, fixed_bytes(header), b"data")
    sealed = cipher.seal(0, True, b"words")

    assert cipher.open(0, True, sealed) == b"words"
    assert cipher.open(0, False, sealed) is None
    assert cipher.open(1, True, sealed) is None
    assert cipher.open(0, True, sealed[:-1] + bytes([sealed[-1] ^ 1])) is None
    assert cipher.open(0, True, b"") is None


def test_a_record_of_csv_may_hold_line_breaks() -> None:
    index = RowIndex(".csv")
    for piece in (b'a,b\n1,"two\nli', b'nes"\n\n3,4'):
        index.add(piece)
    index.finished()

    assert list(index.entries) == [0, 4, 18 | BLANK, 19]


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_for_a_header_raise_only_our_errors(data: bytes, begins: bool) -> None:
    front = MAGIC + b"\0\1" + data if begins else data
    with pytest.raises(MstError):
        read_front("it", io.BytesIO(front))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["suite", "segment", "salt", "prefix", "ending", "bytes", "kind", "n"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(JSON, JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_for_a_header_raises_only_our_errors(header: object, ways: object) -> None:
    import json

    parts = [json.dumps(each).encode() for each in (header, ways)]
    blocks = b"".join(len(each).to_bytes(4, "big") + each for each in parts)
    with contextlib.suppress(MstError):
        read_front("it", io.BytesIO(MAGIC + b"\0\1" + blocks + bytes(32)))


NUMBERS = st.one_of(st.integers(-5, 1 << 70), st.none(), st.text(max_size=3), st.floats())


@given(NUMBERS, NUMBERS, NUMBERS, st.text(alphabet="0123456789abcdefx", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_passphrase_parameters_raise_only_our_errors(
    n: object, r: object, p: object, salt: str
) -> None:
    from mst.seal.keys.wrapping import unwrap_passphrase

    if isinstance(n, int) and isinstance(r, int) and isinstance(p, int) and 0 < n * r * p < 1 << 20:
        return  # a cost that is paid is tested elsewhere
    way = {"kind": "passphrase", "n": n, "r": r, "p": p, "salt": salt, "key": "00" * 60}
    with contextlib.suppress(MstError):
        assert unwrap_passphrase(way, b"a passphrase", bytes(32)) is None


def test_a_header_cannot_ask_for_a_terabyte() -> None:
    from mst.seal.keys.wrapping import unwrap_passphrase

    way = dict(PassphraseWay(b"a passphrase", cost=2).wrap(bytes(32), bytes(32)))

    assert unwrap_passphrase(way, b"a passphrase", bytes(32)) == bytes(32)
    assert unwrap_passphrase(way, b"a passphrasf", bytes(32)) is None
    for change in ({"n": 1 << 40}, {"r": 1 << 30}, {"p": 1 << 30}, {"n": 3}, {"n": 0}):
        with pytest.raises(EncryptionError, match="cost"):
            unwrap_passphrase(way | change, b"a passphrase", bytes(32))


def test_a_line_may_go_over_several_segments(tmp_path: Path, key_file: Path) -> None:
    from mst.seal.keys.key_file import read_key_file
    from mst.seal.keys.wrapping import KeyFileWay

    texts = [b"\xef\xbb\xbf{}\n", b"a" * 4095 + b"\n", b"b" * 9000 + b"\n", b"\n", b"c" * 5000]
    (tmp_path / "a.jsonl").write_bytes(b"".join(texts))
    with (
        (tmp_path / "a.jsonl").open("rb") as source,
        whole_file(tmp_path / "a.jsonl.mst") as target,
    ):
        ways = (KeyFileWay(read_key_file(key_file)),)
        encrypt(source, target, ".jsonl", ways, segment_bytes=SEGMENT_BYTES)
    plain = index_lines(tmp_path / "a.jsonl", Refusals())
    found = index_lines(tmp_path / "a.jsonl.mst", Refusals(), ring_of(str(key_file), None))

    assert (found.starts, found.blanks) == (plain.starts, plain.blanks)
    assert [line_at(found, row) for row in range(4)] == [line_at(plain, row) for row in range(4)]
    assert found.sealed is not None
    assert found.sealed.line(found.starts[2], 4100) == b"b" * 4100
