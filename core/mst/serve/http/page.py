"""The page of `mst serve --web on`: a conversation in the browser, of files that lie here alone."""

from __future__ import annotations

import html
import json
import re
from functools import lru_cache
from importlib.resources import files

from mst.serve.http.wire import Exchange, answer_text

# Path, file and kind.
PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
# Nothing of another place is loaded or asked, no other page may frame this one, and a script that
# a model's text might bring is not run. The empty icon is written in the page itself.
_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'",
        "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
_PLACE = re.compile(r"\{\{([a-z]+)\}\}")


async def answer_page(exchange: Exchange) -> None:
    """Answer with the page, in the browser's language, or with one of its files."""
    name, kind = PAGES[exchange.route]
    text = _file(name)
    if name == "page.html":
        language = language_of(exchange.headers.get("accept-language", ""))
        text = _in(language)
    headers = {**HEADERS, "Vary": "Accept-Language"}
    await answer_text(exchange, text, kind, headers)


def language_of(accepted: str) -> str:
    """Return "zh" or "en": what a browser wants most (RFC 9110, 12.5.4), English where neither."""
    best, most = "en", 0.0
    for each in accepted.split(","):
        tag, _, weight = each.strip().partition(";")
        language = tag.strip().lower().partition("-")[0]
        found = re.fullmatch(r"\s*q=([01](?:\.\d{0,3})?)\s*", weight)
        worth = float(found[1]) if found else 1.0
        if language in ("zh", "en") and worth > most:
            best, most = language, worth
    return best


@lru_cache(maxsize=8)
def _file(name: str) -> str:
    return files("mst.serve").joinpath("web", name).read_text(encoding="utf-8")


@lru_cache(maxsize=2)
def _in(language: str) -> str:
    words = json.loads(_file("words.json"))[language]
    return _PLACE.sub(lambda found: html.escape(words[found[1]]), _file("page.html"))
