"""The page of `mst serve --web on`: in two languages, from here alone, and only where asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.core.serve.http.conftest import Caller

from mst.serve import api_keys
from mst.serve.http.page import PAGES, language_of


@pytest.fixture
def pages(called: Callable[..., Caller]) -> Caller:
    return called(web=True)


def test_there_is_no_page_unless_it_is_asked_for(api: Caller) -> None:
    assert {api.get(path).status for path in PAGES} == {404}


def test_the_page_loads_nothing_from_elsewhere(pages: Caller) -> None:
    whole = {path: pages.get(path) for path in PAGES}
    policy = dict(each.split(" ", 1) for each in
                  whole["/"].headers["content-security-policy"].split("; "))  # fmt: skip

    assert {each.status for each in whole.values()} == {200}
    assert whole["/"].headers["content-type"] == "text/html; charset=utf-8"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not re.search("https?://|//[a-z]", "".join(
        re.sub("^ *//.*", "", each.text, flags=re.M) for each in whole.values()))  # fmt: skip
    assert set(re.findall('(?:src|href)="(/[^"]*)"', whole["/"].text)) == set(PAGES) - {"/"}
    # A policy without 'unsafe-inline' runs none of these.
    assert not re.search(r"<script>|<style|style=| on[a-z]+=|javascript:", whole["/"].text)
    assert not re.search(r"innerHTML|localStorage|sessionStorage|indexedDB|cookie",
                         whole["/page.js"].text)  # fmt: skip


def test_the_page_speaks_the_browsers_language(pages: Caller) -> None:
    chinese = pages.get("/", **{"accept-language": "zh-CN,zh;q=0.9,en;q=0.8"}).text
    english = pages.get("/", **{"accept-language": "de-DE,de"}).text

    assert '<html lang="zh-CN">' in chinese
    assert "\u53d1\u9001" in chinese
    assert '<html lang="en">' in english
    assert "{{" not in chinese + english
    assert re.findall("<[a-z]+", chinese) == re.findall("<[a-z]+", english)


@pytest.mark.parametrize(
    ("accepted", "language"),
    [("", "en"), ("zh", "zh"), ("en, zh;q=0.5", "en"), ("en;q=0.1, zh-TW;q=0.2", "zh"),
     ("fr, zh;q=0.1", "zh"), ("zh;q=0", "en"), ("zh;q=x", "zh"), (";;,,q=1", "en")],
)  # fmt: skip
def test_languages_are_weighed(accepted: str, language: str) -> None:
    assert language_of(accepted) == language


def test_the_page_needs_no_key_and_what_it_asks_does(
    called: Callable[..., Caller], tmp_path: Path
) -> None:
    api_keys.add(tmp_path / "keys.json", "ward")
    caller = called(keys=tmp_path / "keys.json", web=True)

    assert caller.get("/").status == 200
    assert caller.get("/v1/models").status == 401
    assert caller.call("POST", "/", b"{}", {}).status == 405


def test_pages_of_other_sites_reach_it_no_more_than_the_rest(pages: Caller) -> None:
    assert pages.get("/", host="evil.example").status == 403
    assert pages.get("/", origin="http://evil.example").status == 403
