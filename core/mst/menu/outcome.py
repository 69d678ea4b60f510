"""What came of a work, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mst import background
from mst.background import Work, run_of, was_stopped
from mst.errors import MstError
from mst.menu.reports import report_of
from mst.menu.screen import say
from mst.menu.words import Words, duration_words
from mst.quantities import gib
from mst.translation import translated_lines

SEEN = "seen"
_LINES = 14


def show_outcome(words: Words, work: Work) -> None:
    """Print how a work has ended, or that it goes on."""
    stopped = was_stopped(work)
    say(words("outcome.stopped" if stopped else f"outcome.{work.state}", code=work.exit_code))
    run = run_of(work)
    lines = figures(words, run) if run is not None else report_of(words, work)
    if work.state == "done" and (run is not None or lines):
        for line in lines:
            say(line)
    elif work.state != "running" and not stopped:
        show_output(words, work)
        for line in lines if run is None else ():
            say(line)
    mark_seen(work)


def mark_seen(work: Work) -> None:
    """Note that a person knows how a work has ended."""
    with suppress(OSError):
        (work.directory / SEEN).touch()


def show_output(words: Words, work: Work) -> None:
    """Print the end of what a work has printed, in whole lines, which can be copied."""
    lines = [each for each in background.output(work).splitlines() if each.strip()]
    print(translated_lines("\n".join(lines[-_LINES:]), words.language), flush=True)


def figures(words: Words, run: Path) -> list[str]:
    """Return what was measured of a run, a line each."""
    results = _results(run)

    def known(*names: str) -> bool:
        return all(each in results for each in names)

    lines = []
    if known("accuracy_after_restricted", "accuracy_rows"):
        before = results.get("accuracy_before_restricted")
        lines.append(
            words(
                "outcome.accuracy",
                rows=f"{results['accuracy_rows']:.0f}",
                before="?" if before is None else f"{before:.0%}",
                after=f"{results['accuracy_after_restricted']:.0%}",
            )
        )
    if known("best_eval_loss"):
        lines.append(words("outcome.eval_loss", loss=f"{results['best_eval_loss']:.3g}"))
    if known("eval_rewards/accuracies"):
        share = f"{results['eval_rewards/accuracies']:.0%}"
        lines.append(words("outcome.preferred", share=share))
    if known("peak_memory_bytes", "train_seconds", "steps"):
        lines.append(
            words(
                "outcome.cost",
                steps=f"{results['steps']:.0f}",
                time=duration_words(words, results["train_seconds"]),
                memory=gib(results["peak_memory_bytes"]),
            )
        )
    return lines


def _results(run: Path) -> Mapping[str, float]:
    from mst import rundir

    with suppress(MstError, OSError):
        return rundir.read_manifest(run).results
    return {}
