"""Answers that only read: the list, choices for a new run, works in the background, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mst import background
from mst.serve.http.refusals import Refusal
from mst.serve.http.wire import Exchange
from mst.ui.choices import allowed_options, data_files, models
from mst.ui.detail import row
from mst.ui.index import Entry, Index, id_of
from mst.ui.job import Places
from mst.ui.routes import numbers, text
from mst.ui.samples import samples

_LISTED = 50
_LAST_BYTES = 8192
_MOST_WORKS = 20


def listed(index: Index, exchange: Exchange) -> dict[str, Any]:
    """Return a part of the list: those whose name or model has a text, and whose state is one."""
    most = {"offset": 1 << 30, "limit": 200}
    asked = numbers(exchange, most, offset=0, limit=_LISTED)
    wanted, state = text(exchange, "find").casefold(), text(exchange, "state")
    everything = index.entries()
    found = [
        each
        for each in everything
        if (not state or each.summary.state == state)
        and wanted in f"{each.summary.name} {each.summary.model or ''}".casefold()
    ]
    part = found[asked["offset"] : asked["offset"] + asked["limit"]]
    counts: dict[str, int] = {}
    for each in everything:
        counts[each.summary.state] = counts.get(each.summary.state, 0) + 1
    return {
        "all": len(everything),
        "matching": len(found),
        "offset": asked["offset"],
        "states": counts,
        "places": [str(each) for each in index.places],
        "runs": [row(each) for each in part],
    }


def samples_of(entry: Entry, switched_on: bool) -> dict[str, Any]:
    """Return a run's sample answers.

    Raises:
        Refusal: they are not switched on.
    """
    if not switched_on:
        raise Refusal(
            403, "sample answers are shown only by mst ui --samples on.", code="samples_off"
        )
    return {"files": samples(entry.path)}


def choices(places: Places) -> dict[str, Any]:
    """Return what a new run may be made of."""
    return {
        "places": list(places.runs),
        "models": [{"id": each.id, "name": each.name} for each in models(places)],
        "data": [{"id": each.id, "name": each.name} for each in data_files(places.data)],
        "options": [
            {
                "name": name,
                "group": each.metadata["group"],
                "help": each.metadata["help"],
                "choices": list(each.metadata["choices"]),
                "default": each.default,
            }
            for name, each in allowed_options().items()
        ],
    }


def works(index: Index) -> dict[str, Any]:
    """Return the newest runs that were started in the background, newest first."""
    found = [
        _work(each, path)
        for each in background.works()
        if (path := _run_of(each, index)) is not None
    ]
    return {"works": list(reversed(found[-_MOST_WORKS:]))}


def work_of(name: str, index: Index) -> dict[str, Any]:
    """Return one of them, with the end of what it has printed.

    Raises:
        BackgroundError: there is none.
        Refusal: it is none of these runs'.
    """
    work = background.find(name)
    path = _run_of(work, index)
    if path is None:
        raise Refusal(404, "that is no run of these directories.", code="work_not_found")
    return {**_work(work, path), "output": background.output(work, _LAST_BYTES)}


def _run_of(work: background.Work, index: Index) -> Path | None:
    """Return the run that a work trains; None where it is none of those that are shown."""
    path = background.run_of(work)
    return path if path is not None and path.parent in index.places else None


def _work(work: background.Work, run: Path) -> dict[str, Any]:
    return {
        "name": work.name,
        "run": id_of(run),
        "run_name": run.name,
        "state": work.state,
        "exit_code": work.exit_code,
        "started": work.started,
    }
