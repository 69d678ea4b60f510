"""Write docs/man/mst.1, which is installed with mst: `python ci/make_man_page.py`."""

from __future__ import annotations

from pathlib import Path

from mst.cli.man import page

TARGET = Path(__file__).resolve().parents[1] / "docs" / "man" / "mst.1"

if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(page(), encoding="utf-8")
