"""Ask the NVIDIA driver through the text of `nvidia-smi`, where its library cannot be asked."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mst_backends.nvidia_card import Card, Instance, Listing, pci_order, throttle_words

# All calls together. Without persistence mode the first one wakes the driver, about 0.5 s a card;
# a call on a card that fell off the bus may hang for good.
SECONDS = 4.0
# In WSL the tool lies beside the libraries of the Windows driver, and not always on the PATH.
WSL_TOOL = "/usr/lib/wsl/lib/nvidia-smi"
LEAST_FIELDS = (
    "index", "uuid", "name", "pci.bus_id", "driver_version", "memory.total", "memory.free",
)  # fmt: skip
# An older driver refuses a query that has one field it does not know.
FIELDS = (
    *LEAST_FIELDS, "memory.reserved", "compute_cap", "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total", "retired_pages.pending", "remapped_rows.pending",
    "remapped_rows.failure", "clocks_throttle_reasons.active", "temperature.gpu.tlimit",
)  # fmt: skip
# Renamed in driver 535; a driver may refuse either name.
RENAMED = {"clocks_throttle_reasons.active": "clocks_event_reasons.active"}
RETRIES = 5
UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field to query')
CARD_LINE = re.compile(r"GPU (\d+): ")
INSTANCE_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")
# "\\x1b[4mGPU0": some versions underline the heading even when it goes into a pipe.
ESCAPES = re.compile(r"\x1b?\[[0-9;]*m")


def read(topology: bool = True) -> Listing:
    """Return the cards as nvidia-smi prints them, or why it does not.

    Args:
        topology: also ask how the cards are linked.
    """
    tool = shutil.which("nvidia-smi") or (WSL_TOOL if os.access(WSL_TOOL, os.X_OK) else None)
    if tool is None:
        return Listing("nvidia-smi", failure="nvidia-smi is not found")
    deadline = time.monotonic() + SECONDS
    try:
        listing = _query(tool, deadline)
    except subprocess.TimeoutExpired:
        return Listing("nvidia-smi", failure=f"nvidia-smi did not answer in {SECONDS:g} s")
    except OSError as error:
        return Listing("nvidia-smi", failure=f"{tool} does not run: {error.strerror or error}")
    if any(card.mig for card in listing.cards):
        listing = _with_instances(listing, tool, deadline)
    if topology and len(listing.cards) > 1:
        links = parse_topology(_text([tool, "topo", "-m"], deadline))
        cards = [replace(card, links=links.get(card.index, {})) for card in listing.cards]
        listing = replace(listing, cards=tuple(cards))
    return listing


def _text(command: Sequence[str], deadline: float) -> str:
    """Return what the command prints, or "" when it is late: the cards are known without it."""
    try:
        return _call(command, deadline).stdout
    except (subprocess.TimeoutExpired, OSError):
        return ""


def _call(command: Sequence[str], deadline: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=max(0.1, deadline - time.monotonic()),
        check=False,
    )


def _query(tool: str, deadline: float) -> Listing:
    """Return the cards, leaving out the fields that this driver does not know."""
    fields: tuple[str, ...] = FIELDS
    for attempt in range(RETRIES + 1):
        names = ",".join(fields)
        done = _call([tool, f"--query-gpu={names}", "--format=csv,noheader,nounits"], deadline)
        unknown = UNKNOWN_FIELD.search(done.stdout + done.stderr)
        if not unknown:
            break
        name = unknown.group(1)
        rest = tuple(RENAMED.get(field, "") if field == name else field for field in fields)
        rest = tuple(field for field in rest if field)
        fields = LEAST_FIELDS if attempt + 1 >= RETRIES or rest == fields else rest
    return parse_cards(done.stdout + done.stderr, fields)


def parse_cards(text: str, fields: Sequence[str] = FIELDS) -> Listing:
    """Return the cards of `--query-gpu` in csv without header and units.

    Args:
        text: one line a card; anything else is an error message of nvidia-smi.
        fields: the fields that were asked for, in order.
    """
    rows, others = [], []
    for line in text.splitlines():
        values = [value.strip() for value in next(csv.reader([line]), [])]
        if len(values) == len(fields) and values[0].isdigit():
            rows.append(dict(zip(fields, values, strict=True)))
        elif line.strip():
            others.append(line.strip())
    words = " ".join(others)
    return Listing(
        source="nvidia-smi",
        cards=pci_order([_card(row) for row in rows]),
        driver=rows[0]["driver_version"] if rows else "",
        problems=tuple(others) if rows else (),
        failure="" if rows else words or "nvidia-smi printed nothing",
    )


def _card(row: Mapping[str, str]) -> Card:
    capability = re.fullmatch(r"(\d+)\.(\d+)", row.get("compute_cap", ""))
    pending = (row.get("retired_pages.pending"), row.get("remapped_rows.pending"))
    old, new = "clocks_throttle_reasons.active", "clocks_event_reasons.active"
    throttle = row.get(old, row.get(new))
    return Card(
        index=int(row["index"]),
        uuid=row["uuid"] if row["uuid"].startswith("GPU-") else "",
        name=row["name"],
        pci_bus_id=row["pci.bus_id"],
        capability=(int(capability[1]), int(capability[2])) if capability else None,
        memory_total_bytes=_mib(row.get("memory.total")),
        memory_reserved_bytes=_mib(row.get("memory.reserved")),
        memory_free_bytes=_mib(row.get("memory.free")),
        mig=row.get("mig.mode.current") == "Enabled",
        uncorrected_errors=_number(row.get("ecc.errors.uncorrected.volatile.total")),
        # "Yes" or "No" in older versions, 1 or 0 in newer ones.
        repair_pending=any(value in ("Yes", "1") for value in pending),
        repair_failed=row.get("remapped_rows.failure") in ("Yes", "1"),
        throttled=throttle_words(_number(throttle)),
        margin_celsius=_number(row.get("temperature.gpu.tlimit")),
    )


def _number(text: str | None) -> int | None:
    """Return the number, or None for "[N/A]", "[Not Supported]" and the like."""
    try:
        return int(text or "", 0)
    except ValueError:
        return None


def _mib(text: str | None) -> int | None:
    count = _number((text or "").removesuffix("MiB").strip())
    return None if count is None else count * 2**20


def _with_instances(listing: Listing, tool: str, deadline: float) -> Listing:
    """Return the listing with each card's MIG instances; only `-q -x` tells their memory."""
    instances = parse_instances(_text([tool, "-L"], deadline))
    figures = parse_instance_figures(_text([tool, "-q", "-x"], deadline))
    cards = [
        replace(
            card,
            instances=tuple(
                _measured(instance, figures.get((card.uuid, position)))
                for position, instance in instances.get(card.index, {}).items()
            ),
        )
        for card in listing.cards
    ]
    return replace(listing, cards=tuple(cards))


def _measured(instance: Instance, figures: Instance | None) -> Instance:
    if figures is None:
        return instance
    return replace(figures, uuid=instance.uuid, profile=instance.profile)


def parse_instances(text: str) -> dict[int, dict[int, Instance]]:
    """Return the MIG instances of `nvidia-smi -L`, by card and position on the card."""
    instances: dict[int, dict[int, Instance]] = {}
    index = -1
    for line in text.splitlines():
        card, instance = CARD_LINE.match(line), INSTANCE_LINE.match(line)
        if card:
            index = int(card[1])
        elif instance:
            part = Instance(uuid=instance[3], profile=instance[1])
            instances.setdefault(index, {})[int(instance[2])] = part
    return instances


def parse_instance_figures(text: str) -> dict[tuple[str, int], Instance]:
    """Return the nameless MIG instances of `nvidia-smi -q -x`, by card's UUID and position."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return {}
    figures: dict[tuple[str, int], Instance] = {}
    for gpu in root.iter("gpu"):
        for part in gpu.iter("mig_device"):
            total = _mib(part.findtext("fb_memory_usage/total"))
            reserved = _mib(part.findtext("fb_memory_usage/reserved"))
            shared = "device_attributes/shared/multiprocessor_count"
            figures[gpu.findtext("uuid") or "", _number(part.findtext("index")) or 0] = Instance(
                uuid="",
                profile="",
                memory_total_bytes=None if total is None else total - (reserved or 0),
                memory_free_bytes=_mib(part.findtext("fb_memory_usage/free")),
                multiprocessors=_number(part.findtext(shared)),
            )
    return figures


def parse_topology(text: str) -> dict[int, dict[int, str]]:
    """Return how each card reaches each other one, from the matrix of `nvidia-smi topo -m`."""
    links: dict[int, dict[int, str]] = {}
    columns: list[str] = []
    for line in ESCAPES.sub("", text).splitlines():
        words = line.split()
        if not columns and words[:1] == ["GPU0"]:
            columns = words
        elif columns and words and re.fullmatch(r"GPU\d+", words[0]):
            pairs = zip(columns, words[1:], strict=False)
            links[int(words[0][3:])] = {
                int(column[3:]): word
                for column, word in pairs
                if re.fullmatch(r"GPU\d+", column) and word != "X"
            }
    return links
