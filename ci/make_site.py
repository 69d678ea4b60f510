"""Build the site of docs/ offline: `python ci/make_site.py [DIRECTORY]`; build/site without one.

A warning is an error, and so is a page that would have a browser load anything from another host:
the site is read where there is no network. It needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a browser loads by itself. Links of `a` are followed by the reader alone.
LOADED = {
    "script": ("src",), "link": ("href",), "img": ("src", "srcset"), "iframe": ("src",),
    "source": ("src", "srcset"), "video": ("src", "poster"), "audio": ("src",),
    "object": ("data",), "embed": ("src",), "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"), "form": ("action",),
}  # fmt: skip
HOST = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//|^https?:", re.IGNORECASE)
# In style sheets, also those within pages; `data:` addresses are no hosts.
STYLE_LOADS = re.compile(
    r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE
)
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname")


class Loads(HTMLParser):
    """Collects the addresses that a page loads from another host."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of one element."""
        for name, value in attrs:
            if name in LOADED.get(tag, ()) and HOST.search((value or "").strip()):
                self.found.append(f"<{tag} {name}={value}>")


def foreign_loads(site: Path) -> Iterator[str]:
    """Yield what pages and style sheets would load from another host, with the file it stands in.

    Scripts are not read: those of Sphinx and furo come with the constraints' exact versions, and
    load the search index beside them alone.
    """
    for path in sorted(site.rglob("*")):
        if path.suffix not in (".html", ".css", ".svg"):
            continue
        text = path.read_text(encoding="utf-8")
        loads = Loads()
        if path.suffix != ".css":
            loads.feed(text)
        for each in [*loads.found, *STYLE_LOADS.findall(text)]:
            yield f"{path.relative_to(site)}: {each}"


def refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    """Stop whatever asks for a host; an audit hook of this process."""
    if event in NETWORK:
        raise RuntimeError(f"building the site asked for the network: {event}{arguments[1:]}")


def build(target: Path) -> int:
    """Build the site into `target`, which is replaced when the build is whole.

    Returns:
        0, or 1 after the reasons were printed; `target` is as it was then.
    """
    from sphinx.cmd.build import build_main

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".site-") as directory:
        site, trees = Path(directory, "site"), Path(directory, "trees")
        # Each build is a fresh one: an old page must not hide a broken link.
        flags = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(trees)]
        if build_main([*flags, str(ROOT / "docs"), str(site)]):
            return 1
        foreign = list(foreign_loads(site))
        if foreign:
            print("the site must load nothing from another host:", *foreign, sep="\n  ")
            return 1
        (site / ".buildinfo").unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        site.replace(target)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Build the site where the command line says."""
    parser = argparse.ArgumentParser(description="Build the site of docs/ offline.")
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "build" / "site")
    target = parser.parse_args(arguments).directory.absolute()
    if target.exists() and not (target / "searchindex.js").exists() and any(target.iterdir()):
        print(f"{target} holds something else than a site: name an empty or new directory")
        return 1
    sys.addaudithook(refuse_network)
    code = build(target)
    if code == 0:
        print(f"{target / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
