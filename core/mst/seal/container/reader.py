"""An encrypted file, opened: whole or a part of it, and never a byte that is not authentic."""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mst.errors import EncryptionError
from mst.seal.container.cipher import DATA, INDEX, Segments, is_key_of
from mst.seal.container.layout import TAG_BYTES, Front, read_front, segments
from mst.seal.container.row_index import entries_of

_HASH_BYTES = 1 << 20


class SealedFile:
    """An open encrypted file whose header is authentic."""

    def __init__(self, path: Path, find_key: Callable[[str, Front], bytes]) -> None:
        """Open it.

        Args:
            path: the file.
            find_key: returns its data key; raises EncryptionError when it has none.

        Raises:
            EncryptionError: it can't be read, is no encrypted file, is cut off, or lacks its key.
        """
        self.path = path
        self._handle = -1
        try:
            stream: BinaryIO = path.open("rb")
        except OSError as error:
            raise EncryptionError(
                f"{path} could not be read: {error.strerror}. Check its permissions."
            ) from None
        with stream:
            self.front = read_front(str(path), stream)
            self._size = os.fstat(stream.fileno()).st_size
            self.data_key = find_key(str(path), self.front)
            if not is_key_of(self.data_key, self.front):
                raise EncryptionError(
                    f"{path}: the key opens it, but its header was changed since it was written, so"
                    " nothing of it is used. Copy it again from where it came."
                )
            self._handle = os.dup(stream.fileno())
        header, fixed = self.front.header, self.front.fixed
        self.count = segments(header.plain_bytes, header.segment_bytes)
        self._data = Segments(self.data_key, header, fixed, DATA)
        self._index = Segments(self.data_key, header, fixed, INDEX)
        self._index_at = self.front.end + header.plain_bytes + self.count * TAG_BYTES
        if self._size < self._index_at + TAG_BYTES:
            self.close()
            raise EncryptionError(
                f"{path} is cut off: it has {self._size} bytes, and its header promises at least"
                f" {self._index_at + TAG_BYTES}. Copy it again from where it came."
            )

    def __enter__(self) -> SealedFile:
        """Return the file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Close it, where nobody did."""
        self.close()

    def close(self) -> None:
        """Close it; twice is no error."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def segment(self, number: int) -> bytes:
        """Return a segment's plaintext.

        Raises:
            EncryptionError: it is not what was written.
        """
        return self._opened(number, self._sealed(number))

    def line(self, start: int, max_bytes: int) -> bytes:
        """Return what stands from a byte to the end of its line, its end included.

        Args:
            start: of the line.
            max_bytes: no more than these.

        Raises:
            EncryptionError: it is not what was written.
        """
        number, at = divmod(start, self.front.header.segment_bytes)
        found = bytearray()
        while number < self.count and len(found) < max_bytes:
            plain = self.segment(number)
            end = plain.find(b"\n", at) + 1
            found += plain[at : end or None]
            if end:
                break
            number, at = number + 1, 0
        return bytes(found[:max_bytes])

    def _sealed(self, number: int) -> bytes:
        header = self.front.header
        start = number * header.segment_bytes
        length = min(header.segment_bytes, header.plain_bytes - start) + TAG_BYTES
        return self._read(self.front.end + start + number * TAG_BYTES, length)

    def _opened(self, number: int, sealed: bytes) -> bytes:
        plain = self._data.open(number, number == self.count - 1, sealed)
        if plain is None:
            raise self._damaged(f"segment {number + 1} of {self.count}")
        return plain

    def _damaged(self, part: str) -> EncryptionError:
        return EncryptionError(
            f"{self.path}: {part} is not what was encrypted: the file was cut, changed or damaged."
            " Nothing of it is used. Copy it again from where it came."
        )

    def _read(self, start: int, length: int) -> bytes:
        try:
            return os.pread(self._handle, length, start)
        except OSError as error:
            problem = error.strerror
        raise EncryptionError(
            f"{self.path} could not be read: {problem}. Check the disk it lies on."
        )

    def rows(self) -> array[int]:
        """Return the index, as `mst.seal.container.row_index` made it.

        Raises:
            EncryptionError: it is not what was written.
        """
        return entries_of(str(self.path), b"".join(self._index_pieces(lambda sealed: None)))

    def _index_pieces(self, seen: Callable[[bytes], object]) -> Iterator[bytes]:
        step = self.front.header.segment_bytes + TAG_BYTES
        places = range(self._index_at, self._size, step)
        for number, start in enumerate(places):
            sealed = self._read(start, min(step, self._size - start))
            seen(sealed)
            plain = self._index.open(number, number == len(places) - 1, sealed)
            if plain is None:
                raise self._damaged("the index of its rows")
            yield plain

    def verify(self) -> str:
        """Make sure that every byte is as it was written; return the SHA-256 of the file.

        Raises:
            EncryptionError: names the first part that is not.
        """
        hasher = hashlib.sha256(self._read(0, self.front.end))
        for number in range(self.count):
            sealed = self._sealed(number)
            hasher.update(sealed)
            self._opened(number, sealed)
        for _ in self._index_pieces(hasher.update):
            pass
        return hasher.hexdigest()


class PlainBytes(io.RawIOBase):
    """The plaintext of an encrypted file, as a file that can be read from any place."""

    def __init__(self, sealed: SealedFile) -> None:
        """Begin at the first byte; `sealed` is closed with it."""
        self._sealed = sealed
        self._place = 0
        self._held: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that it can be read from any place."""
        return True

    def tell(self) -> int:
        """Return where the next byte stands."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte; return where it stands."""
        header = self._sealed.front.header
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: header.plain_bytes}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, from at most one segment."""
        header = self._sealed.front.header
        if self._place >= header.plain_bytes:
            return 0
        number, start = divmod(self._place, header.segment_bytes)
        if self._held[0] != number:
            self._held = (number, self._sealed.segment(number))
        piece = memoryview(self._held[1])[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def close(self) -> None:
        """Forget the plaintext and close the file."""
        self._held = (-1, b"")
        self._sealed.close()
        super().close()
