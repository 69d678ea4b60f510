"""A copy of a data file with placeholders for personal data; everything else stays as it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from mst.data.records import Record, kind_of, records
from mst.data.refusals import RowError
from mst.durable import sync_directory, sync_file
from mst.errors import DataError
from mst.seal.personal_data.scan import FileScan, scan_file
from mst.seal.personal_data.walk import masked, masked_keys


def mask_file(source: Path, target: Path, found: FileScan) -> FileScan:
    """Write a masked copy of a data file, search it, and only then give it its name.

    Args:
        source: resolved.
        target: where the copy goes; of the same kind, packed or not.
        found: what `scan_file` found in the source.

    Returns:
        What was found in the copy: nothing.

    Raises:
        DataError: the target is there, of another kind, or can't be written; or a row of the
            source can't be read, so that the copy would lack it.
    """
    check_target(source, target)
    if found.unread:
        raise DataError(
            f"{source} can't be masked, because rows of it can't be read: {found.unread[0]} A copy"
            " would lack them."
        )
    # The suffix says what it holds, so the part keeps the whole name.
    part = target.with_name(f".part-{target.name}")
    try:
        part.unlink(missing_ok=True)
        # No one may read the copy who may not read the source.
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, source.stat().st_mode & 0o777))
        _WRITERS[str(kind_of(source))](source, part)
        copy = scan_file(part)
        _compare(found, copy, source)
        sync_file(part)
        _name(part, target)
        sync_directory(target.parent)
    except FileExistsError:
        raise _there(target) from None
    except OSError as error:
        raise DataError(
            f"cannot write --mask {target}: {error.strerror or type(error).__name__}. Choose"
            " another place; nothing was left there."
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return copy


def check_target(source: Path, target: Path) -> None:
    """Raise DataError when a masked copy of `source` can't go to `target`."""
    if target.exists():
        raise _there(target)
    if kind_of(target) != kind_of(source):
        raise DataError(
            f"--mask {target}: the copy is of the kind of {source.name}; give it a name that ends"
            f" in {''.join(source.suffixes[-2:]) or source.suffix}."
        )
    if not target.parent.is_dir():
        raise DataError(f"--mask {target}: there is no directory {target.parent}. Make it first.")


def _name(part: Path, target: Path) -> None:
    """Give the finished copy its name, unless something lies there."""
    try:
        # Unlike a rename, a link never replaces what came to lie there meanwhile.
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links there, as on a FAT stick
        if target.exists():
            raise FileExistsError from None
        part.rename(target)


def _there(target: Path) -> DataError:
    return DataError(
        f"--mask {target} is there already, and a copy never replaces a file. Name another."
    )


def _compare(found: FileScan, copy: FileScan, source: Path) -> None:
    if copy.found or copy.unread or copy.rows != found.rows:
        kinds = ", ".join(each.kind for each in copy.found) or "other rows than the source"
        raise DataError(
            f"{source} was not masked: the copy still held {kinds}, and was removed. Please report"
            " this."
        )


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing, packed as its suffix says."""
    with ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("wb"))
        if path.suffix == ".gz":
            # No name and no time of the source in the copy.
            raw = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        elif path.suffix == ".zst":
            import zstandard

            raw = stack.enter_context(zstandard.ZstdCompressor().stream_writer(raw, closefd=False))
        yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline=""))


def _rows(path: Path) -> Iterator[Record]:
    with records(path) as opened:
        for item in opened.items:
            if isinstance(item, RowError):
                raise item
            yield item


def _dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
        return json.dumps(value)
    return text


def _by_line(render: Callable[[Any], str]) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        line = 0
        with _text(target) as out:
            for row in _rows(source):
                # A row's number is its line's, and stays so: blank lines stay blank.
                out.write("\n" * (row.number - line - 1))
                out.write(render(masked(row.fields)) + "\n")
                line = row.number

    return write


def _json(source: Path, target: Path) -> None:
    from mst.data.compressed import opened

    with opened(source) as packed:
        whole = json.loads(packed.stream.read().decode("utf-8-sig"))
    with _text(target) as out:
        out.write(_dumps(masked(whole)) + "\n")


def _delimited(delimiter: str) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        with _text(target) as out:
            writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
            for index, row in enumerate(_rows(source)):
                if index == 0:
                    writer.writerow(masked_keys(list(row.fields)))
                writer.writerow(masked(row.fields).values())

    return write


def _parquet(source: Path, target: Path) -> None:
    from pyarrow import parquet

    with parquet.ParquetFile(source, memory_map=False) as read:
        schema = _masked_schema(read.schema_arrow)
        with parquet.ParquetWriter(target, schema) as out:
            for batch in read.iter_batches(batch_size=4096):
                out.write_batch(_masked_batch(batch, schema))


def _arrow(source: Path, target: Path) -> None:
    import pyarrow

    with source.open("rb") as opened:
        stream = opened.read(6) != b"ARROW1"
    with pyarrow.OSFile(str(source)) as file:
        read = pyarrow.ipc.open_stream(file) if stream else pyarrow.ipc.open_file(file)
        schema = _masked_schema(read.schema)
        batches = read if stream else map(read.get_batch, range(read.num_record_batches))
        new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
        with new(str(target), schema) as out:
            for batch in batches:
                out.write_batch(_masked_batch(batch, schema))


def _masked_schema(schema: Any) -> Any:
    import pyarrow

    names = masked_keys(schema.names)
    fields = [schema.field(index).with_name(name) for index, name in enumerate(names)]
    # What other programs noted there, pandas an index for one, may hold values.
    return pyarrow.schema(fields)


def _masked_batch(batch: Any, schema: Any) -> Any:
    import pyarrow

    columns = [masked(row) for row in batch.to_pylist()]
    return pyarrow.RecordBatch.from_pylist(columns, schema=schema)


_WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "jsonl": _by_line(_dumps),
    "txt": _by_line(lambda fields: str(fields["text"])),
    "json": _json,
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "parquet": _parquet,
    "arrow": _arrow,
}
