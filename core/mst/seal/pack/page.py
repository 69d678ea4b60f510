"""The page that a person reads: all of an archive in one HTML file, without a script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from mst.seal.pack.rules import ITEMS

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}"
    "td,th{border:1px solid #bbb;padding:.3rem .5rem;text-align:left;vertical-align:top;"
    "overflow-wrap:anywhere}code{font-size:.9em}"
)


def page(members: Mapping[str, bytes]) -> bytes:
    """Return the page.

    Args:
        members: files of the archive, by name.
    """
    run = json.loads(members["run/run.json"])
    seal = json.loads(members.get("run/seal.json", b"{}"))
    data = json.loads(members["personal-data.json"])
    log = json.loads(members["audit/verification.json"])
    parts = [
        "<h1>What this run did</h1>",
        _table(
            ("", ""),
            [
                ("model", f"{run['model']}, SHA-256 {run['model_sha256']}"),
                ("status", run["status"]),
                ("began", run["created"]),
                ("ended", run["finished"] or "not recorded"),
                ("mst", run["mst_version"]),
                ("who", ", ".join(_people(members))),
                ("audit log", "; ".join(log["problems"]) or f"whole, {log['events']} events"),
                ("result", _result(members)),
                ("privacy budget", _privacy(run["privacy"])),
            ],
        ),
        "<h2>What is shown, and which rules ask for it</h2>"
        "<p>This is a guide to the evidence. It certifies nothing.</p>",
        _table(("", "what it shows", "in this archive", "asked for by"), _items(members)),
        "<h2>Data</h2>",
        _table(("file", "SHA-256", "personal data"), (_data_row(each) for each in data)),
        "<h2>Seal</h2>",
        f"<p>{escape(_seal_line(seal))}</p>",
        _table(
            ("way out that was tried", "what it met"),
            ((way["name"], way["found"]) for way in seal.get("ways", ())),
        ),
        "<h2>Figures</h2>",
        _table(("", ""), sorted((name, f"{value:g}") for name, value in run["results"].items())),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>What a run did</title><style>{_STYLE}</style></head><body>\n{body}\n"
        "</body></html>\n"
    ).encode()


def _table(heads: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    lines = [
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    ]
    if not lines:
        return "<p>Nothing is recorded.</p>"
    top = f"<tr>{head}</tr>" if any(heads) else ""
    return f"<table>{top}{''.join(lines)}</table>"


def _items(members: Mapping[str, bytes]) -> Iterable[tuple[str, ...]]:
    for each in ITEMS:
        missing = [name for name in each.members if name not in members]
        where = ", ".join(each.members) if not missing else f"not shown: no {', '.join(missing)}"
        yield each.name, each.says, where, ", ".join(each.rules)


def _privacy(budget: Mapping[str, Any] | None) -> str:
    if budget is None:
        return "differential privacy was not used"
    return (
        f"ε = {budget['epsilon']:.3f}, δ = {budget['delta']:.2g}, for each {budget['unit']} of"
        f" {budget['units']} ({budget['accountant']}; {budget['checked_by']}:"
        f" {budget['epsilon_checked']:.3f})"
    )


def _people(members: Mapping[str, bytes]) -> list[str]:
    found = (json.loads(line) for line in members.get("audit/events.jsonl", b"").splitlines())
    return sorted({f"{each['user']} (uid {each['uid']}) on {each['host']}" for each in found})


def _result(members: Mapping[str, bytes]) -> str:
    found = json.loads(members["outputs.json"])
    wrong = sorted(f"{name} is {how}" for name, how in found.items() if how != "as logged")
    return "; ".join(wrong) or (f"{len(found)} files, all as logged" if found else "not logged")


def _data_row(facts: Mapping[str, Any]) -> tuple[str, str, str]:
    if "not_counted" in facts:
        return facts["path"], facts["sha256"], f"not counted: {facts['not_counted']}"
    kinds = [f"{kind}: {each['values']}" for kind, each in facts["found"].items()]
    return facts["path"], facts["sha256"], ", ".join(kinds) or "none of the kinds looked for"


def _seal_line(seal: Mapping[str, Any]) -> str:
    if not seal:
        return "No jail is recorded for this run."
    if seal["layer"] == "off":
        return f"The jail was switched off. Reason given: {seal['reason']}"
    return f"Layer: {seal['layer']}, {seal['kernel']}."
