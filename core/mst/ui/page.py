"""The page's files: HTML in one of two languages, and scripts and styles that lie here alone."""

from __future__ import annotations

import html
import json
import re
from functools import lru_cache
from importlib.resources import files
from typing import Any

from mst.figure_names import figure_names
from mst.serve.http.page import HEADERS, language_of
from mst.serve.http.wire import Exchange, answer_text

_SCRIPT, _STYLE = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
# Path and kind; each is a file of this name under web/. They hold nothing of anybody's.
FILES = {
    "/page.css": _STYLE,
    "/enter.js": _SCRIPT,
    "/page.js": _SCRIPT,
    "/asking.js": _SCRIPT,
    "/charts.js": _SCRIPT,
    "/parts.js": _SCRIPT,
    "/list.js": _SCRIPT,
    "/run.js": _SCRIPT,
    "/start.js": _SCRIPT,
    "/machine.js": _SCRIPT,
    "/uplot/uPlot.esm.js": _SCRIPT,
    "/uplot/uPlot.min.css": _STYLE,
}
PAGE, ENTRANCE = "/", "/enter"
_HTML = "text/html; charset=utf-8"
_PLACE = re.compile(r"\{\{([a-z_]+)\}\}")
_LANG = {"en": "en", "zh": "zh-CN"}
# HEADERS has a policy that frames nothing already; this is for browsers that know the old name.
_PAGE_HEADERS = {**HEADERS, "X-Frame-Options": "DENY", "Vary": "Accept-Language, Cookie"}


def texts(language: str) -> dict[str, str]:
    """Return every text of the page in "en" or "zh"."""
    found: dict[str, str] = json.loads(_file("words.json"))[language]
    return found | {f"figure_{name}": text for name, text in figure_names(language).items()}


async def answer_file(exchange: Exchange) -> None:
    """Answer with a script or a style."""
    kind = FILES[exchange.route]
    await answer_text(exchange, _file(exchange.route[1:]), kind, _PAGE_HEADERS)


async def answer_page(
    exchange: Exchange, fixed: str, settings: dict[str, Any], inside: bool
) -> None:
    """Answer with the page, or, for who has no session, with how to come in.

    Args:
        exchange: the request.
        fixed: language that the command was given, or "auto".
        settings: what the page's scripts need to know; nothing of a run.
        inside: there is a session.
    """
    language = chosen_language(exchange, fixed)
    shown = inside and exchange.route == PAGE
    # Who comes with a link is let in by the page itself, for what follows # is never sent.
    status = 200 if shown or exchange.route == ENTRANCE else 401
    text = page(language, settings, "page.html" if shown else "enter.html")
    await answer_text(exchange, text, _HTML, _PAGE_HEADERS, status)


def chosen_language(exchange: Exchange, fixed: str) -> str:
    """Return "zh" or "en": as the address asks, else as the command, else as the browser."""
    asked = re.fullmatch(r"lang=(zh|en)", exchange.query)
    if asked:
        return asked[1]
    return language_of(exchange.headers.get("accept-language", "")) if fixed == "auto" else fixed


def page(language: str, settings: dict[str, Any], name: str) -> str:
    """Return a page as it is sent."""
    words = texts(language)
    places = {
        **words,
        "lang": _LANG[language],
        "other": "zh" if language == "en" else "en",
        "words": json.dumps(words, ensure_ascii=False),
        "settings": json.dumps(settings),
    }
    return _PLACE.sub(lambda found: html.escape(places[found[1]]), _file(name))


@lru_cache(maxsize=32)
def _file(name: str) -> str:
    return files("mst.ui").joinpath("web", *name.split("/")).read_text(encoding="utf-8")
