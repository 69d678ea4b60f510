"""What an evaluation, an export or a merge has found, in plain words: read from what they wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mst.background import Work
from mst.figure_names import shares
from mst.menu.words import Words

# Of `mst eval`, in a run's directory; the page looks for it there too.
EVALUATION = "eval.json"


def report_of(words: Words, work: Work) -> list[str]:
    """Return what a work of the menu has found, a line each; none where it wrote nothing."""
    command, *rest = work.arguments
    run = work.cwd / rest[0] if rest else work.cwd
    # Where a file is damaged, or a newer version writes it otherwise, the command's own words do.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if command == "eval":
            return list(_evaluation(words, _written(work, run / EVALUATION)))
        if command == "export" and "--format" in rest:
            name = rest[rest.index("--format") + 1]
            directory = run / "export" / name
            return list(_export(words, _written(work, directory / "manifest.json"), directory))
        if command == "merge" and work.state == "done":
            return [words("outcome.merged", path=run / "merged")]
    return []


def _written(work: Work, file: Path) -> Any:
    """Return a JSON file that the work has written.

    Raises:
        ValueError: it is older than the work.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    if str(found["created"]) < work.started:
        raise ValueError
    return found


def _evaluation(words: Words, report: Any) -> Iterator[str]:
    yield words("outcome.judged", rows=report["rows"])
    for each in report["figures"]:
        name, verdict = each["name"], each["verdict"] or ""
        yield words(
            "outcome.figure",
            name=words.texts.get(f"figures.{name}", name),
            before=_shown(name, each["before"]),
            after=_shown(name, each["value"]),
        ) + (words("outcome.verdict", verdict=words.said(verdict)) if verdict else "")
    for note in report["notes"]:
        yield words("plan.note", text=words.said(note))


def _export(words: Words, manifest: Any, directory: Path) -> Iterator[str]:
    passed = manifest["status"] == "passed"
    key = "outcome.export_passed" if passed else "outcome.export_failed"
    yield words(key, format=manifest["format"], path=directory)
    for fault in manifest["faults"]:
        yield words("plan.note", text=words.said(fault))
    quality = manifest["quality"]
    if quality is not None:
        model, answers = quality["model"], quality["answers"]
        yield words(
            "outcome.export_figures",
            tokens=model["tokens"],
            ratio=f"{model['perplexity_ratio']:.4f}",
            agreement=f"{model['agreement']:.2%}",
        )
        if answers is not None:
            yield words(
                "outcome.export_answers",
                asked=answers["asked"],
                before=f"{answers['trained_right']:.1%}",
                after=f"{answers['right']:.1%}",
            )
    for what, why in manifest["not_checked"].items():
        yield words("outcome.not_checked", what=what, why=words.said(why))


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.1%}" if name in shares() else f"{value:.4g}"
