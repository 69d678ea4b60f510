"""How rows name images, and which images are refused."""

from __future__ import annotations

import csv
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as pillow  # noqa: TID253
from tests.core.images.conftest import asked

from mst.cli import main
from mst.data.formats import Reading, read
from mst.data.images import Image, open_image, row_images
from mst.data.rows import Message
from mst.errors import MstError

SECRET = "secret name"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes rows beside a red and a blue image."""
    pillow.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "red.png")
    pillow.new("RGB", (6, 6), (0, 0, 255)).save(tmp_path / "blue.jpg")

    def rows(*found: dict[str, Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in found))
        return str(path)

    return rows


def shape(message: Message) -> list[str]:
    """Return a turn's parts, images by the names of their files."""
    return [each if isinstance(each, str) else Path(each.path).name for each in message.parts]


@pytest.mark.parametrize(
    "row",
    [
        asked("see <image> now", "a") | {"images": ["red.png"]},
        asked("see <image> now", "a") | {"images": "red.png"},
        asked("see <image> now", "a") | {"image": {"path": "red.png"}},
        asked([{"type": "text", "text": "see "}, {"type": "image", "image": "red.png"},
               {"type": "text", "text": " now"}], "a"),
        asked([{"type": "text", "text": "see "},
               {"type": "image_url", "image_url": {"url": "red.png"}},
               {"type": "text", "text": " now"}], "a"),
        asked([{"type": "text", "text": "see "}, {"type": "image"},
               {"type": "text", "text": " now"}], "a") | {"images": ["red.png"]},
        {"query": "see <image> now", "response": "a", "images": ["red.png"]},
        {"instruction": "see <image> now", "output": "a", "images": ["red.png"]},
        {"conversations": [{"from": "human", "value": "see <image> now"},
                           {"from": "gpt", "value": "a"}], "image": "red.png"},
    ],
)  # fmt: skip
def test_an_image_stands_where_the_row_puts_it(
    write: Callable[..., str], row: dict[str, Any]
) -> None:
    found = read([write(row)]).rows[0]

    assert shape(found.messages[0]) == ["see ", "red.png", " now"]
    assert found.messages[0].content == "see  now"
    (image,) = row_images(found)
    assert (image.width, image.height) == (8, 4)
    assert open_image(image).getpixel((0, 0)) == (255, 0, 0)


def test_images_without_a_place_stand_before_the_first_question(
    write: Callable[..., str],
) -> None:
    row = asked("see", "a") | {"images": ["red.png", "blue.jpg"]}
    row["messages"].insert(0, {"role": "system", "content": "s"})
    found = read([write(row)]).rows[0]

    assert [shape(each) for each in found.messages] == [[], ["red.png", "blue.jpg", "see"], []]


def test_a_row_may_do_without_images(write: Callable[..., str]) -> None:
    rows = read([write(asked("<image>q", "a") | {"images": ["red.png"]}, asked("q", "a"))]).rows

    assert [len(row_images(row)) for row in rows] == [1, 0]


def test_a_path_may_be_absolute_or_a_file_address(
    write: Callable[..., str], tmp_path: Path
) -> None:
    for path in (str(tmp_path / "red.png"), (tmp_path / "red.png").as_uri()):
        found = read([write(asked("q", "a") | {"images": [path]})]).rows[0]

        assert row_images(found)[0].width == 8


def test_a_csv_cell_names_one_image_or_a_list(write: Callable[..., str], tmp_path: Path) -> None:
    write()
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["query", "response", "images"], ["q", "a", "red.png"], ["q", "a", '["blue.jpg"]']]
        )

    assert [Path(row_images(row)[0].path).name for row in read([str(path)]).rows] == [
        "red.png",
        "blue.jpg",
    ]


def test_a_column_of_another_name_is_named_with_columns(write: Callable[..., str]) -> None:
    path = write(asked("q", "a") | {"foto": ["red.png"]})

    assert len(row_images(read([path], Reading(columns=("foto=images",))).rows[0])) == 1
    assert row_images(read([path]).rows[0]) == ()


def test_a_phones_picture_is_turned_as_it_says(write: Callable[..., str], tmp_path: Path) -> None:
    picture = pillow.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "phone.jpg", exif=exif)
    (image,) = row_images(read([write(asked("q", "a") | {"images": ["phone.jpg"]})]).rows[0])

    assert (image.width, image.height) == open_image(image).size == (4, 8)


def png_that_says(width: int, height: int) -> bytes:
    """Return a PNG file of a few bytes with a header of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


BAD = {
    "text.png": b"no image at all",
    "empty.png": b"",
    "huge.png": png_that_says(60_000, 60_000),
    "large.png": png_that_says(10_000, 9_000),
    "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
}


@pytest.mark.parametrize(
    ("row", "needles"),
    [
        (asked("q", "a") | {"images": [f"{SECRET}.png"]}, ("image 1", "no file")),
        (asked("q", "a") | {"images": ["red.png", "text.png"]}, ("image 2", "no image of a kind")),
        (asked("q", "a") | {"images": ["empty.png"]}, ("no image of a kind",)),
        (asked("q", "a") | {"images": ["page.eps"]}, ("no image of a kind",)),
        (asked("q", "a") | {"images": ["cut.png"]}, ("damaged or cut off",)),
        (asked("q", "a") | {"images": ["cut.jpg"]}, ("damaged or cut off",)),
        (asked("q", "a") | {"images": ["huge.png"]}, ("more than 89,478,485 pixels",)),
        (asked("q", "a") | {"images": ["large.png"]}, ("more than 89,478,485 pixels",)),
        (asked("q", "a") | {"images": ["."]}, ("that of no file",)),
        (asked("q", "a") | {"images": ["pipe"]}, ("that of no file",)),
        (asked("q", "a") | {"images": [f"https://{SECRET}/a.png"]}, ("'images'", "fetches")),
        (asked("q", "a") | {"images": ["data:image/png;base64,AAAA"]}, ("'images'", "fetches")),
        (asked([{"type": "image_url", "image_url": {"url": "http://x"}}], "a"),
         ("message 1 image 1", "'image_url'", "fetches")),
        (asked("q", "a") | {"images": [{"bytes": "AAAA", "path": None}]}, ("itself",)),
        (asked("q", "a") | {"images": [7]}, ("'images'", "path, found a number")),
        (asked("<image><image>", "a") | {"images": ["red.png"]}, ("images: 1, places: 2",)),
        (asked([{"type": "image"}], "a"), ("names no path",)),
        (asked([{"type": "image", "path": "red.png"}], "a") | {"images": ["red.png"]}, ("both",)),
        (asked("q", [{"type": "image", "path": "red.png"}]),  # type: ignore[arg-type]
         ("message 2", "assistant")),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["red.png"]}, ("'images'",)),
        (asked("q", "a") | {"videos": ["v.mp4"]}, ("'videos'", "video or sound")),
    ],
)  # fmt: skip
def test_a_bad_image_is_named_by_its_row_and_never_by_its_text(
    write: Callable[..., str], tmp_path: Path, row: dict[str, Any], needles: tuple[str, ...]
) -> None:
    for name, data in BAD.items():
        (tmp_path / name).write_bytes(data)
    for name in ("cut.png", "cut.jpg"):
        pillow.effect_noise((64, 64), 50).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-900])
    os.mkfifo(tmp_path / "pipe")
    path = write(row)
    with pytest.raises(MstError) as caught:
        read([path])
    message = str(caught.value)

    assert [each for each in ("rows.jsonl, row 1", *needles) if each not in message] == [], message
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__


def test_a_row_with_a_bad_image_can_be_skipped(write: Callable[..., str]) -> None:
    path = write(
        asked("q", "a") | {"images": ["red.png"]}, asked("q", "a") | {"images": ["none.png"]}
    )
    found = read([path], Reading(on_bad_row="skip"))

    assert len(found.rows) == 1
    assert "no file" in found.files[0].skipped[0]
    assert found.files[0].images == 1


def test_an_image_that_changes_changes_the_fingerprint(
    write: Callable[..., str], tmp_path: Path
) -> None:
    path = write(asked("q", "a") | {"images": ["red.png"]})
    before = read([path])
    pillow.new("RGB", (8, 4), (254, 0, 0)).save(tmp_path / "red.png")

    assert read([path]).files[0].sha256 == before.files[0].sha256
    assert read([path]).files[0].images_sha256 != before.files[0].images_sha256
    with pytest.raises(MstError, match="not what it was"):
        open_image(row_images(before.rows[0])[0])


def test_without_pillow_the_extra_is_named(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(asked("q", "a") | {"images": ["red.png"]})
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(MstError, match=r"pip install 'mst-train\[vision\]'"):
        read([path])


def test_an_images_path_stands_in_no_repr() -> None:
    assert SECRET not in repr(Image(SECRET))
    assert SECRET not in repr(Message("user", "", parts=(SECRET, Image(SECRET))))


def test_a_row_with_an_image_is_previewed(
    vision_model: Callable[[str], Path], squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = vision_model("qwen2_vl")
    code = main(["preview", "--model", str(directory), "--dataset", str(squares), "--no-text"])
    out = capsys.readouterr().out

    assert code == 0, out
    assert "rows.jsonl, row 1" in out
    assert " with loss" in out
