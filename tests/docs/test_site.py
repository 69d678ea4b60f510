"""The site of the documents: whole, in both languages, and without another host."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from tests.docs.test_docs import ROOT

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS))[:-3] for path in DOCS.rglob("*.md"))


def command() -> ModuleType:
    """Return ci/make_site.py as a module."""
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "ci/make_site.py")

    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "ci/make_site.py"), str(target)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "site"
    done = make(target)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return target


class Page(HTMLParser):
    """The language of a page, its first heading, and the links of its navigation."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.language, self.heading, self.inside = "", "", ""
        self.navigation: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "html":
            self.language = found["lang"] or ""
        if tag == "h1" and not self.heading:
            self.inside = "h1"
        if tag == "div" and found.get("class") == "sidebar-tree":
            self.inside = "sidebar"
        if tag == "a" and self.inside == "sidebar":
            self.navigation.append(found["href"] or "")
        elif tag == "a":
            self.inside = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "aside"):
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "h1":
            self.heading += data


def test_both_front_pages_say_their_language_and_lead_to_each_other(site: Path) -> None:
    english, chinese = Page(site / "index.html"), Page(site / "index.zh-CN.html")

    assert (english.language, english.heading) == ("en", "MST, the Multi-Silicon Trainer")
    assert (chinese.language, chinese.heading) == ("zh-CN", "MST，多芯片训练器")
    assert 'href="index.zh-CN.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="index.html"' in (site / "index.zh-CN.html").read_text(encoding="utf-8")


def test_every_document_is_in_the_navigation(site: Path) -> None:
    listed = set(Page(site / "index.zh-CN.html").navigation) - {"#"}

    assert {f"{page}.html" for page in PAGES} - {"index.html", "index.zh-CN.html"} <= listed
    assert [page for page in PAGES if not (site / f"{page}.html").exists()] == []


def test_both_front_pages_list_the_same_documents() -> None:
    def listed(name: str) -> list[str]:
        text = (DOCS / name).read_text(encoding="utf-8").split("\n## ", 1)[1]
        return [each.removesuffix(".zh-CN") for each in re.findall(r"\]\(([\w./-]+)\.md\)", text)]

    assert listed("index.md") == listed("index.zh-CN.md")


def test_a_page_in_both_languages_is_listed_in_both() -> None:
    chinese = (DOCS / "index.zh-CN.md").read_text(encoding="utf-8")
    translated = [page for page in PAGES if page.endswith(".zh-CN") and page != "index.zh-CN"]

    assert translated
    assert [page for page in translated if f"({page}.md)" not in chinese] == []
    for page in translated:
        assert page.removesuffix(".zh-CN") in PAGES


def test_what_a_page_loads_from_another_host_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://a.example">x</a><script src="//b.example/x.js"></script>'
        '<img src="_images/x.png"><link href="https://c.example/x.css">'
        "<style>@font-face{src:url('https://d.example/x')}</style>",
        encoding="utf-8",
    )
    (tmp_path / "b.css").write_text('a{b:url("data:image/svg+xml,<svg/>")}', encoding="utf-8")
    found = list(command().foreign_loads(tmp_path))

    assert [re.findall(r"\w\.example", each)[0] for each in found] == [
        "b.example", "c.example", "d.example"
    ]  # fmt: skip


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    done = make(tmp_path)

    assert done.returncode == 1
    assert "holds something else" in done.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]
