"""A data file as a stream of bytes: decompressed, hashed as it lies on disk, and bounded."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from mst.data.encrypted import opened_plain, plain_name
from mst.errors import DataError
from mst.seal.keys.ring import NO_KEYS, KeyRing

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Text shrinks to a tenth, logs to a fiftieth; gzip's limit is 1,032. A file that grows past both
# bounds is made to fill a memory, not to hold rows.
MAX_RATIO = 100
MAX_RATIO_FROM_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 18


@dataclass(frozen=True)
class ByteSource:
    """An open file.

    Attributes:
        stream: its bytes, decrypted and decompressed.
        sha256: reads what is left, and returns the hash of the bytes on disk.
        key: name of the key that opened it; "" where it is not encrypted.
    """

    stream: BinaryIO
    sha256: Callable[[], str]
    key: str = ""


class _Hashing(io.RawIOBase):
    """Bytes of a file, hashed and counted in passing."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.hasher = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.hasher.update(data)
        self.count += len(data)
        return len(data)


class _Counting(_Hashing):
    """Bytes of a file that was hashed when it was authenticated, counted in passing."""

    def readinto(self, buffer: Any) -> int:
        count: int = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self.count += count
        return count


class _Zstd:
    """Zstandard frames, one after another; one that is cut off is an error.

    zstandard's own stream reader takes a cut-off frame for a whole one.
    """

    def __init__(self, decompressor: Any, packed: IO[bytes]) -> None:
        self._decompressor, self._packed = decompressor, packed
        self._frame: Any = None
        self._left = self._ready = b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            # A block of 4 bytes may unpack to 128 KiB, so a piece of 4 KiB to 128 MiB.
            piece = self._left or self._packed.read(4096)
            if not piece:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError
                return b""
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = self._frame.decompress(piece)
            self._left = self._frame.unused_data
        data, self._ready = self._ready[:size], self._ready[size:]
        return data


def check_growth(
    file: str, packed: int, unpacked: int, remedy: str, from_bytes: int = MAX_RATIO_FROM_BYTES
) -> None:
    """Make sure that what is unpacked is not made to fill a memory.

    Args:
        file: it came from.
        packed: bytes that were read.
        unpacked: bytes that they became.
        remedy: what to do with a file that is meant so.
        from_bytes: so many are taken in any case.

    Raises:
        DataError: it is more than `MAX_RATIO` times as much, and more than `from_bytes`.
    """
    if unpacked > from_bytes and unpacked > MAX_RATIO * packed:
        raise DataError(
            f"{file} unpacks to more than {MAX_RATIO} times its size and more than "
            f"{from_bytes >> 20} MiB, as a decompression bomb does. If it is what you want to "
            f"train on, {remedy}."
        )


class _Bounded(io.RawIOBase):
    """Decompressed bytes; ends with a DataError where they are damaged or far too many."""

    def __init__(self, file: str, inner: Any, packed: _Hashing, from_bytes: int) -> None:
        self._file, self._inner, self._packed = file, inner, packed
        self._from_bytes = from_bytes
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        self._count += len(data)
        remedy = "decompress it by hand and pass the result"
        check_growth(self._file, self._packed.count, self._count, remedy, self._from_bytes)
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._inner.read(size)
            return data
        except (OSError, EOFError, zlib.error) as error:
            problem = type(error).__name__
        except Exception as error:  # zstandard may not be installed, so its error has no name here
            if type(error).__name__ != "ZstdError":
                raise
            problem = "ZstdError"
        raise DataError(
            f"{self._file} cannot be decompressed ({problem}): it is cut off, damaged, or not what "
            "its suffix says. Copy it again from where it came."
        )


@contextlib.contextmanager
def opened(
    path: Path, max_ratio_from_bytes: int = MAX_RATIO_FROM_BYTES, keys: KeyRing = NO_KEYS
) -> Iterator[ByteSource]:
    """Open a data file.

    Args:
        path: a suffix of `COMPRESSIONS` says how it is packed, before that of encryption.
        max_ratio_from_bytes: up to so many bytes it may unpack to more than `MAX_RATIO` times
            its size.
        keys: open encrypted files.

    Raises:
        DataError: when it cannot be read, or, while it is read, unpacked.
        EncryptionError: as `mst.data.encrypted.opened_plain`.
    """
    with opened_plain(path, keys) as plain:
        packed = _Hashing(plain.raw) if plain.sha256 is None else _Counting(plain.raw)
        stream: Any = io.BufferedReader(packed, _BUFFER_BYTES)
        whole = stream
        compression = COMPRESSIONS.get(plain_name(path).suffix.lower())
        if compression is not None:
            inner = _decompressor(path, compression, stream)
            stream = io.BufferedReader(
                _Bounded(str(path), inner, packed, max_ratio_from_bytes), _BUFFER_BYTES
            )

        def sha256() -> str:
            if plain.sha256 is not None:
                return plain.sha256
            while whole.read(_BUFFER_BYTES):
                pass
            return packed.hasher.hexdigest()

        yield ByteSource(stream, sha256, plain.key)


def _decompressor(path: Path, compression: str, stream: IO[bytes]) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stream, mode="rb")
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{path} is compressed with zstd, which needs the zstandard package, and it is not "
            "installed. Run `python -m pip install 'mst-train[data]'`, or decompress the file."
        ) from None
    return _Zstd(zstandard.ZstdDecompressor(), stream)
