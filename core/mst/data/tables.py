"""Data files that are tables: parquet and arrow, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mst.data.compressed import check_growth
from mst.errors import DataError

_BATCH_ROWS = 256
_REMEDY = "write it as .jsonl and pass that"


def rows(
    path: Path, kind: str, plain: BinaryIO | None = None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield each row of a table with its number, from 1.

    Args:
        path: the file.
        kind: "parquet" or "arrow" (the IPC file or the IPC stream, which `datasets` writes).
        plain: what is read instead of the file, where that is encrypted.

    Raises:
        DataError: when pyarrow is not installed, the file is damaged, or it unpacks to so much that
            it is made to fill a memory.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path} is a table, which needs the pyarrow package, and it is not installed. Run "
            "`python -m pip install 'mst-train[data]'`, or convert the file to .jsonl."
        ) from None
    number = unpacked = 0
    size = path.stat().st_size
    try:
        for batch in _parquet(path, plain) if kind == "parquet" else _arrow(path, plain):
            unpacked += sum(map(_unpacked_bytes, batch.columns))
            check_growth(str(path), size, unpacked, _REMEDY)
            for fields in batch.to_pylist():
                number += 1
                yield number, fields
        return
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        problem = type(error).__name__
    raise DataError(
        f"{path} cannot be read as {kind} after row {number} ({problem}): it is cut off, damaged, "
        "or not what its suffix says. Copy it again from where it came."
    )


def _unpacked_bytes(column: Any) -> int:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):  # one value can stand for many rows
        column = column.dictionary_decode()
    size: int = column.nbytes
    return size


def _parquet(path: Path, plain: BinaryIO | None) -> Iterator[Any]:
    from pyarrow import parquet

    # Bytes are not mapped: a file that shrinks while it is read would end the process.
    with parquet.ParquetFile(plain or path, memory_map=False) as file:
        # What its pages unpack to is known before the first is: one page can hold gigabytes.
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            for place in range(group.num_columns):
                column = group.column(place)
                packed = column.total_compressed_size
                check_growth(str(path), packed, column.total_uncompressed_size, _REMEDY)
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow(path: Path, plain: BinaryIO | None) -> Iterator[Any]:
    import pyarrow

    with pyarrow.OSFile(str(path)) if plain is None else pyarrow.PythonFile(plain, "r") as source:
        stream = source.read(6) != b"ARROW1"
        source.seek(0)
        if stream:
            batches: Iterator[Any] = iter(pyarrow.ipc.open_stream(source))
        else:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)
