"""The page's texts are there in both languages, and what others wrote is as they published it."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import pytest

from mst.ui.page import texts

WEB = Path(str(files("mst.ui"))) / "web"
# Of what its makers published, as `npm ci` in this directory checks.
UPLOT = {
    "uPlot.esm.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
MODULES = Path(__file__).parent / "node_modules"
# Keys that are put together from a name: states, figures, parts of the memory and options.
JOINED = re.compile(r"(state|figure|part|option)_")


def used() -> set[str]:
    scripts = "".join(each.read_text() for each in WEB.glob("*.js"))
    pages = "".join(each.read_text() for each in WEB.glob("*.html"))
    return set(re.findall(r"\bwords\.([a-z_]+)", scripts)) | set(
        re.findall(r"\{\{([a-z_]+)\}\}", pages)
    )


def test_every_text_is_there_in_both_languages() -> None:
    english, chinese = texts("en"), texts("zh")

    assert list(english) == list(chinese)
    assert all(each.strip() for each in (*english.values(), *chinese.values()))
    han = re.compile("[\u4e00-\u9fff]")
    assert not [
        name for name, each in english.items() if han.search(each) if name != "otherlanguage"
    ]
    assert [name for name, each in chinese.items() if not han.search(each)] == ["otherlanguage"]


def test_every_text_is_used_and_every_used_one_is_there() -> None:
    known = set(texts("en"))
    own = {"lang", "other", "words", "settings"}

    assert used() - own <= known
    assert {each for each in known - used() if not JOINED.match(each)} == set()


def test_commands_and_options_that_the_texts_name_exist() -> None:
    from mst.cli import COMMANDS

    for language in ("en", "zh"):
        named = set(re.findall(r"mst ([a-z]+)", " ".join(texts(language).values())))
        assert named <= set(COMMANDS), named - set(COMMANDS)


def test_the_chart_library_is_as_its_makers_published_it() -> None:
    wanted = json.loads((Path(__file__).parent / "package.json").read_text())["devDependencies"]
    text = (WEB / "uplot" / "uPlot.esm.js").read_text()

    assert "MIT" in (WEB / "uplot" / "LICENSE").read_text()
    assert f"(v{wanted['uplot']})" in text
    for name, digest in UPLOT.items():
        assert sha256((WEB / "uplot" / name).read_bytes()).hexdigest() == digest
    if not MODULES.is_dir():
        pytest.skip("the files are what was taken over; to compare them anew: npm ci")
    for name in ("uPlot.esm.js", "uPlot.min.css"):
        assert (WEB / "uplot" / name).read_bytes() == (
            MODULES / "uplot" / "dist" / name
        ).read_bytes()
