"""Sphinx's configuration of the site of these documents; `ci/make_site.py` builds it.

The documents are GitHub's Markdown and stay so: nothing in them is for Sphinx alone. The navigation
is read from the links of the front pages, section by section.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pygments.lexers.data import JsonLexer
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "MST"
author = "the MST authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
html_theme = "furo"
html_title = "MST, the Multi-Silicon Trainer"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False

CHINESE = ".zh-CN"
FRONT_PAGES = ("index", f"index{CHINESE}")
LINK = re.compile(r"\]\(([\w./-]+)\.md\)")
ABOVE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+README[\w.-]*\.md(?:#[\w-]+)?\)")


def sections(text: str) -> list[tuple[str, list[str]]]:
    """Return a front page's headings of the second level, each with the documents it links to."""
    _, *parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    found = zip(parts[::2], parts[1::2], strict=True)
    return [(title, list(dict.fromkeys(LINK.findall(body)))) for title, body in found]


def navigation(front_page: str, text: str) -> str:
    """Return hidden tables of contents in MyST, for the documents that a front page lists.

    The Chinese page lists English documents too, where there are no others; their place in the
    navigation is the English one.
    """
    chinese = front_page.endswith(CHINESE)
    tables = []
    for title, documents in sections(text):
        own = [each for each in documents if each.endswith(CHINESE) == chinese]
        if own:
            tables.append((title, own))
    if not chinese:
        tables.append(("中文", [f"index{CHINESE}"]))
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(own) + "\n```\n"
        for title, own in tables
    )


def prepare(app: Sphinx, document: str, source: list[str]) -> None:
    """Make of the text as GitHub shows it what the site needs.

    A front page gets the navigation. The READMEs lie above the documents and are no pages of the
    site: their links become plain text.
    """
    source[0] = ABOVE.sub(r"\1", source[0])
    if document in FRONT_PAGES:
        source[0] += navigation(document, source[0])


def tell_language(
    app: Sphinx, document: str, template: str, context: dict[str, Any], tree: object
) -> None:
    """Say in a Chinese page's HTML that it is Chinese: for fonts, screen readers, hyphenation."""
    if document.endswith(CHINESE):
        context["language"] = "zh-CN"


def setup(app: Sphinx) -> None:
    """Connect the above, and name lexers for blocks that Pygments has none for."""
    app.add_lexer("jsonl", JsonLexer)
    app.add_lexer("csv", TextLexer)
    app.connect("source-read", prepare)
    app.connect("html-page-context", tell_language)


# Sphinx asks what the HTML is in; pages in Chinese say so themselves.
language = "en"
# For `python -m sphinx docs OUT` typed by hand.
exclude_patterns = [path.name for path in Path(__file__).parent.glob("_*")]
