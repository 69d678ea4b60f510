"""The page of `mst serve --web on` in a real browser: Chromium, as a person uses it.

It needs `playwright` and a Chromium of the system (`apt-get install chromium`), which the extra
`dev` does not bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import blank_page, browser, skip_without
from tests.core.serve.test_serve_command import Server, started

from mst.serve import api_keys

pytestmark = pytest.mark.slow
PHONE = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def server(
    tiny_model_with_context: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    skip_without()
    home = tmp_path_factory.mktemp("home")
    key = api_keys.add(home / "keys.json", "ward")
    made = started(
        home, tiny_model_with_context(20_000), "--port", 0, "--max-tokens", 15_000, "--web", "on",
        "--keys-file", home / "keys.json",
    )  # fmt: skip
    (home / "key").write_text(key)
    yield made
    made.end()


@pytest.fixture(scope="module")
def chromium(server: Server) -> Iterator[Any]:
    with browser() as found:
        yield found


def opened(server: Server, chromium: Any, language: str) -> tuple[Any, list[str]]:
    """Return the page with the key given, and a list of what it asks and complains of."""
    page, told = blank_page(chromium, PHONE, language)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.locator("#key").fill((server.audit.parent / "key").read_text())
    page.keyboard.press("Enter")
    page.locator("#model option").wait_for(state="attached")
    return page, told


def test_a_conversation_by_keyboard_on_a_phones_screen(server: Server, chromium: Any) -> None:
    page, told = opened(server, chromium, "en-GB")
    # Its likeliest words end soon; drawn ones go on.
    page.locator("#settings summary").click()
    page.locator("#temperature").fill("2")
    page.locator("#settings summary").click()
    page.locator("#text").fill("hello <b>there</b>")
    page.keyboard.press("Enter")
    page.locator("#talk .assistant").filter(has_text="e").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("[stopped]").wait_for()
    user = page.locator("#talk .user").inner_text()
    wide = page.evaluate("document.documentElement.scrollWidth")
    kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    parts = [page.locator(each).bounding_box() for each in ("#send", "#text", "#talk")]
    shown = [each["y"] + each["height"] for each in parts]
    page.screenshot(path=str(server.audit.parent / "page.png"))
    page.get_by_role("button", name="New conversation").click()

    assert user == "hello <b>there</b>"
    assert wide <= PHONE["width"]
    assert max(shown) <= PHONE["height"]
    assert kept == [0, 0, ""]
    assert page.locator("#talk p").count() == 0
    # The one complaint is that of the request without a key, which the page answers by asking.
    complaints = [each for each in told if each.startswith(("error", "warning"))]
    assert all("401" in each for each in complaints), complaints
    asked = [each for each in told if "://" in each.split(" ")[0]]
    assert {each.split("/")[2] for each in asked} == {f"127.0.0.1:{server.port}"}


def test_the_page_is_chinese_where_the_browser_is(server: Server, chromium: Any) -> None:
    page, _ = opened(server, chromium, "zh-CN")

    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("#send").inner_text() == "\u53d1\u9001"
    assert page.locator("#keys").is_hidden()
