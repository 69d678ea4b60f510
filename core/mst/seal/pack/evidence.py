"""What an archive holds of a run: read from its directory and from the audit log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mst import rundir, serial
from mst.data.rows import FileFacts
from mst.durable import sha256
from mst.errors import DataError
from mst.seal.audit.verification import verify
from mst.seal.personal_data.scan import scan_file
from mst.seal.supply.bill import BILL

_DOCUMENTS = (
    rundir.MANIFEST, rundir.REQUEST, rundir.PLAN, rundir.FACTS, rundir.SEAL, rundir.METRICS,
)  # fmt: skip


def collect(run: Path, log: Path) -> dict[str, bytes]:
    """Return the files of an archive, by their names in it. None holds a row.

    Args:
        run: the run directory.
        log: directory of the audit log.

    Raises:
        RunError: it is no run directory.
        AuditError: there is no log.
    """
    manifest = rundir.read_manifest(run)
    events: list[tuple[bytes, dict[str, Any]]] = []
    verification = verify(log, take=lambda line, event: events.append((line, event)))
    lines, found = _of_run(events, run, manifest.created)
    members = {
        f"run/{name}": (run / name).read_bytes() for name in _DOCUMENTS if (run / name).is_file()
    }
    members["files.sha256"] = _listing(run)
    members["outputs.json"] = _json(_outputs(run, found))
    members["audit/verification.json"] = serial.dumps(verification).encode()
    members["personal-data.json"] = _json(_personal_data((*manifest.data, *manifest.val_data)))
    members["privacy-budget.json"] = _json(_privacy(manifest))
    if lines:
        members["audit/events.jsonl"] = b"".join(line + b"\n" for line in lines)
    measured = {"held_out": dict(manifest.results), "mst_eval": _evaluations(found)}
    if any(measured.values()):
        members["evaluation.json"] = _json(measured)
    for export in (*sorted(run.glob(f"*/{BILL}")), *sorted(run.glob(f"export/[!.]*/{BILL}"))):
        members["sbom.cdx.json"] = export.read_bytes()
    return members


def _privacy(manifest: rundir.RunManifest) -> dict[str, Any]:
    if manifest.privacy is None:
        return {"differential_privacy": "not used"}
    # Steps that a run has not taken have spent nothing, but neither is it the run that was planned.
    return {
        "differential_privacy": "holds" if manifest.status == "done" else "the run is not done",
        "covers": "the tuned weights; not metrics, logs or held-out figures",
        **asdict(manifest.privacy),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _of_run(
    events: Sequence[tuple[bytes, dict[str, Any]]], run: Path, created: str
) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Return the lines and events of the commands that had to do with a run since it was begun."""
    path = str(run)
    commands = {
        event["command"]
        for _, event in events
        if (event["facts"].get("run") == path or event["facts"].get("adapter") == f"{path}/adapter")
        # Both in UTC. Before that, another run lay there.
        and event["time"][:19] >= created[:19]
    }
    kept = [(line, event) for line, event in events if event["command"] in commands]
    return [line for line, _ in kept], [event for _, event in kept]


def _evaluations(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"time": event["time"], **event["facts"]}
        for event in found
        if event["event"] == "eval.ended"
    ]


def _outputs(run: Path, found: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return whether each file of the result is still what the log says."""
    ended = [event["facts"] for event in found if event["event"] == "train.ended"]
    logged = ended[-1].get("outputs", {}) if ended else {}
    return {name: _compared(run / name, digest) for name, digest in logged.items()}


def _compared(path: Path, digest: str) -> str:
    if not path.is_file():
        return "missing"
    return "as logged" if sha256(path) == digest else "changed"


def _listing(run: Path) -> bytes:
    """Return the hashes of a run's files, as sha256sum writes them."""
    files = (each for each in sorted(run.rglob("*")) if each.is_file() and not each.is_symlink())
    return "".join(
        f"{sha256(each)}  {each.relative_to(run)}\n" for each in files if each.name != rundir.LOCK
    ).encode("utf-8", "surrogateescape")


def _personal_data(files: Sequence[FileFacts]) -> list[dict[str, Any]]:
    """Return how much personal data each file holds, or why that was not counted."""
    return [{"path": each.path, "sha256": each.sha256, **_counted(each)} for each in files]


def _counted(facts: FileFacts) -> dict[str, Any]:
    path = Path(facts.path)
    if facts.key:
        return {"not_counted": "it is encrypted: `mst data scan` it before that"}
    if not path.is_file():
        return {"not_counted": "it is no longer there"}
    try:
        found = scan_file(path)
    except DataError:
        return {"not_counted": "it can't be read"}
    if found.sha256 != facts.sha256:
        return {"not_counted": "it has changed since"}
    kinds = {each.kind: {"values": each.values, "rows": len(each.rows)} for each in found.found}
    return {"rows": found.rows, "found": kinds}
