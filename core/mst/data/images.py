"""Images that rows name: found, checked, and opened again when their batch is made."""

from __future__ import annotations

import hashlib
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from mst.data.refusals import Place, refuse
from mst.errors import DataError, MstError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from mst.data.rows import Row

# Kinds whose readers are part of Pillow and run no other program.
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow's own limit against files that unpack to fill the memory (`Image.MAX_IMAGE_PIXELS`), which
# it only warns of: a quarter of a gibibyte in RGB.
MOST_PIXELS = 89_478_485
MOST_BYTES = 256 << 20
# EXIF's tag of how a camera was held; from 5 to 8 width and height change places.
_ORIENTATION, _ON_ITS_SIDE = 0x0112, range(5, 9)


@dataclass(frozen=True)
class Image:
    """An image file that a row names; its pixels stay on disk. A path is a row's text: no repr.

    Attributes:
        path: as resolved against the data file's directory; "" before it is known.
        sha256: of its bytes.
        width: in pixels, turned as its EXIF says.
        height: likewise.
    """

    path: str = field(repr=False)
    sha256: str = ""
    width: int = 0
    height: int = 0


# Stands for an image whose path is in a column of its own.
LISTED = Image("")


def find_image(place: Place, path: str) -> Image:
    """Return the image at a path that a row names.

    Args:
        place: of the row, with the image's number.
        path: relative to the data file's directory, or absolute.

    Raises:
        RowError: it is not there, is no image, is damaged, or is too large.
        MstError: Pillow is not installed.
    """
    where = Path(place.file).parent / path
    data = _bytes(place, where)
    found = _size(data)
    if isinstance(found, str):
        refuse(place, found, "Save it again, or remove the row.")
    return Image(str(where), hashlib.sha256(data).hexdigest(), *found)


def open_image(image: Image) -> Picture:
    """Return an image's pixels as RGB, turned as its EXIF says, as transformers reads them.

    Raises:
        DataError: it is not what it was when the rows were read.
    """
    from PIL import ImageOps

    try:
        data = Path(image.path).read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise DataError(
            "an image is not what it was when the rows were read. Put it back as it was, or start"
            " again."
        )
    with _opened(data) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def row_images(row: Row) -> tuple[Image, ...]:
    """Return the images of a row's conversation, in their order."""
    return tuple(part for turn in row.messages for part in turn.parts if not isinstance(part, str))


def digest_of(rows: Iterable[Row]) -> tuple[int, str]:
    """Return how many images rows name, and a hash of all of them; 0 and "" for none."""
    hasher, count = hashlib.sha256(), 0
    for row in rows:
        for image in row_images(row):
            hasher.update(bytes.fromhex(image.sha256))
            count += 1
    return count, hasher.hexdigest() if count else ""


def require_pillow() -> None:
    """Raise MstError when Pillow, which reads images, is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise MstError(
            "The data has images, and reading them needs Pillow, which is not installed here."
            " Install it: python -m pip install 'mst-train[vision]'"
        ) from None


def _bytes(place: Place, path: Path) -> bytes:
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= MOST_BYTES:
            return path.read_bytes()
        problem = (
            f"the image's file is larger than {MOST_BYTES >> 20} MiB"
            if stat.S_ISREG(found.st_mode)
            else "the image's path is that of no file"
        )
    except FileNotFoundError:
        problem = "there is no file at the image's path (relative ones begin at the data file)"
    except (OSError, ValueError):
        problem = "the image's file can't be read"
    refuse(place, problem, "Mend the path, or remove the row.")


def _size(data: bytes) -> tuple[int, int] | str:
    """Return the width and the height of an image that is whole, or what is wrong with it."""
    require_pillow()
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError

    large = f"the image has more than {MOST_PIXELS:,} pixels"
    try:
        with _opened(data) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                return large
            picture.load()
            turned = picture.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
    except DecompressionBombError:
        return large
    except UnidentifiedImageError:
        return f"the file is no image of a kind that is read ({', '.join(KINDS)})"
    # Pillow's readers raise whatever a damaged file leads them to: OSError, SyntaxError,
    # ValueError, struct.error, zlib.error and others.
    except Exception:
        return "the image is damaged or cut off"
    return (height, width) if turned else (width, height)


@contextmanager
def _opened(data: bytes) -> Iterator[Picture]:
    import PIL.Image as pillow

    with warnings.catch_warnings():
        # It warns of large images, whose size is judged here, and of odd metadata.
        warnings.simplefilter("ignore")
        with pillow.open(BytesIO(data), formats=KINDS) as picture:
            yield picture
