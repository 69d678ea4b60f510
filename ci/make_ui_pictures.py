"""Make the pictures in docs/ui.md: `python ci/make_ui_pictures.py RUNS`, a directory of runs.

It shows the newest finished run. Needs `playwright`, pillow, and a Chromium of the system.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mst.runs import newest_done
from mst.ui.index import id_of

TARGET = Path(__file__).resolve().parents[1] / "docs" / "ui"
DESKTOP, PHONE = {"width": 1100, "height": 820}, {"width": 360, "height": 740}
# Name, language, screen, part of the page, and what is there once it is drawn.
PICTURES = (
    ("list-zh-desktop", "zh-CN", DESKTOP, "#/", "table.runs tbody tr"),
    ("run-en-desktop", "en-GB", DESKTOP, "#/run/{id}", "figure canvas"),
    ("run-zh-phone", "zh-CN", PHONE, "#/run/{id}", "figure canvas"),
    ("start-en-phone", "en-GB", PHONE, "#/start", "form.start"),
)
# Of a picture: enough for text and lines.
COLOURS = 128


def picture(browser: Any, link: str, base: str, run: str, wanted: tuple[Any, ...]) -> bytes:
    """Return a picture of a part of the page as PNG."""
    from PIL import Image

    _, language, size, part, there = wanted
    page = browser.new_context(viewport=size, locale=language).new_page()
    page.goto(link)
    page.locator("table.runs tbody tr").first.wait_for()
    page.goto(f"{base}/{part.format(id=run)}")
    page.locator(there).first.wait_for()
    page.wait_for_timeout(800)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    small = io.BytesIO()
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main(runs: Path) -> None:
    """Write all pictures."""
    from playwright.sync_api import sync_playwright

    found = newest_done(runs.resolve())
    if found is None:
        raise SystemExit(f"{runs} has no finished run.")
    process = subprocess.Popen(
        [sys.executable, "-m", "mst", "ui", "--runs", str(runs)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    links = (line.split()[1] for line in process.stdout if line.startswith("page "))
    program = shutil.which("chromium") or shutil.which("google-chrome")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    TARGET.mkdir(exist_ok=True)
    with sync_playwright() as begun:
        browser = begun.chromium.launch(executable_path=program, args=arguments)
        for wanted in PICTURES:
            link = next(links)
            shot = picture(browser, link, link.partition("/enter")[0], id_of(found), wanted)
            (TARGET / f"{wanted[0]}.png").write_bytes(shot)
        browser.close()
    process.terminate()
    process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
