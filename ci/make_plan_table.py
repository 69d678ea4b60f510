"""Write the reference table of docs/planning.md: `python ci/make_plan_table.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.reference_plans import table  # noqa: E402

TARGET = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- plans:begin -->", "<!-- plans:end -->"


def document(text: str) -> str:
    """Return the document with its table made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    TARGET.write_text(document(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
