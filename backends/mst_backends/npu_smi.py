"""Read what Huawei's `npu-smi` prints: chips, their processes, how they are linked.

The table's layout differs by driver version and chip; tests/data/npu_smi has recorded ones. In all
of them a chip takes two rows, the first with its health, the second with its bus and its memory.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MIB = 2**20
_USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")


@dataclass(frozen=True)
class Chip:
    """One chip as `npu-smi info` lists it; None is what the row does not tell.

    Attributes:
        npu: number of the card.
        chip: number of the chip on its card; None where cards have one and it has no number.
        physical: number of the chip on the machine, where the layout has a column for it.
        name: as printed: "910B3", "Ascend910", "310P3".
        health: "OK", "Warning", "Alarm", "Critical" or "UNK".
        temperature_celsius: of the chip.
        memory_column: the column that the memory was read from.
        memory_used_bytes: by all processes and the driver.
        memory_total_bytes: of the chip.
        power_watts: that it draws.
    """

    npu: int
    chip: int | None
    physical: int | None
    name: str
    health: str
    temperature_celsius: float | None
    memory_column: str
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_watts: float | None = None


@dataclass(frozen=True)
class Process:
    """A process that holds memory of a chip; `chip` is None where cards have one chip only."""

    npu: int
    chip: int | None
    pid: int
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Info:
    """The whole table of `npu-smi info`; `version` is the driver's, "" when not printed."""

    version: str
    chips: tuple[Chip, ...]
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Reading:
    """What npu-smi said at one moment, or why it said nothing.

    Attributes:
        info: its table of chips, empty after an error.
        logical: what `parse_mapping` returns, empty when it has no such command.
        topology: what `parse_topology` returns, empty when unknown.
        boards: the NPU Name of chips that the table names by their series only, by that name, as
            {"Ascend910": "9392"}.
        error: why `info` is empty; "" when it is not.
    """

    info: Info = Info("", (), ())
    logical: Mapping[tuple[int, int | None], int] = field(default_factory=dict)
    topology: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    boards: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


class NpuSmiError(Exception):
    """npu-smi failed; the text says how."""


def run(command: Sequence[str], seconds: float) -> str:
    """Return what a command prints.

    Raises:
        NpuSmiError: when it can't be started, fails, or is late.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NpuSmiError(f"did not answer in {seconds:.1f} s") from error
    except OSError as error:
        raise NpuSmiError(error.strerror or str(error)) from error
    # A driver that does not answer is told on either stream, by some versions with exit code 0.
    if done.returncode != 0 or "dcmi module initialize failed" in done.stdout + done.stderr:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise NpuSmiError(" ".join(lines[-2:]) or f"exit code {done.returncode}")
    return done.stdout


def read(command: str, seconds: float) -> Reading:
    """Return what npu-smi says of this machine; never raises.

    Args:
        command: the program.
        seconds: for all its calls together. Only the table of chips is needed; what else is late
            or not known to an old version stays unknown.
    """
    deadline = time.monotonic() + seconds

    def ask(*arguments: str) -> str:
        return run([command, "info", *arguments], max(0.1, deadline - time.monotonic()))

    def ask_if_possible(*arguments: str) -> str:
        try:
            return ask(*arguments)
        except NpuSmiError:
            return ""

    try:
        info = parse_info(ask())
    except NpuSmiError as error:
        return Reading(error=f"{command} info: {error}")
    if not info.chips:
        return Reading(error=f"{command} info lists no chip (version {info.version or 'unknown'})")
    several = len(info.chips) > 1
    boards = {}
    # Chips of one name in a machine are of one kind, so the first stands for them.
    series = {one.name: one for one in reversed(info.chips) if one.name.startswith("Ascend")}
    for chip in series.values():
        number = () if chip.chip is None else ("-c", str(chip.chip))
        board = parse_board(ask_if_possible("-t", "board", "-i", str(chip.npu), *number))
        boards[chip.name] = board.get("NPU Name", "")
    return Reading(
        info=info,
        logical=parse_mapping(ask_if_possible("-m")),
        topology=parse_topology(ask_if_possible("-t", "topo")) if several else {},
        boards={name: board for name, board in boards.items() if board},
    )


def parse_info(text: str) -> Info:
    """Return the chips and processes of `npu-smi info`; rows that are not understood are left out.

    Args:
        text: all that it printed.
    """
    version, columns, first = "", [""], None
    chips: list[Chip] = []
    processes: list[Process] = []
    in_processes = False
    for cells in _rows(text):
        if cells[0].startswith("npu-smi"):
            version = cells[0].split()[1]
        elif any(cell.startswith("Process id") for cell in cells):
            in_processes = True
        elif any(cell.startswith("Bus-Id") for cell in cells):
            columns = cells[-1].split()
        elif in_processes:
            processes += _process(cells)
        elif cells[0].startswith("NPU") or len(cells) < 3:
            continue
        elif first is None:
            first = cells
        else:
            chips += _chip(first, cells, columns)
            first = None
    return Info(version, tuple(chips), tuple(processes))


def parse_mapping(text: str) -> dict[tuple[int, int | None], int]:
    """Return the logical number of each (card, chip) from `npu-smi info -m`.

    The logical number is the one that CANN and ASCEND_RT_VISIBLE_DEVICES count by. Rows without
    one, as of a card's controller ("Mcu"), are left out; on a 950 there is no chip number.
    """
    names: list[str] = []
    mapping = {}
    for line in text.splitlines():
        # Names of columns hold single spaces.
        cells = re.split(r"\t+|\s{2,}", line.strip())
        if "Chip Logic ID" in cells:
            names = cells
            continue
        row = dict(zip(names, cells, strict=False))
        npu, chip, logical = (row.get(f"{one} ID", "") for one in ("NPU", "Chip", "Chip Logic"))
        if npu.isdigit() and logical.isdigit():
            mapping[int(npu), int(chip) if chip.isdigit() else None] = int(logical)
    return mapping


def parse_board(text: str) -> dict[str, str]:
    """Return the "name : value" lines of `npu-smi info -t board -i 0 -c 0`."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def parse_topology(text: str) -> dict[str, dict[str, str]]:
    """Return how each chip reaches the others, from `npu-smi info -t topo`.

    Returns:
        By label of the row, then of the column, "NPU0" or "Phy-ID0": "HCCS", "SIO", "PHB", ….
        The diagonal is left out.
    """
    lines = [line.split() for line in text.splitlines() if line.split()]
    labels: list[str] = []
    links: dict[str, dict[str, str]] = {}
    for words in lines:
        named = [word for word in words if re.fullmatch(r"(NPU|Phy-ID)\d+", word)]
        # A header is all labels, perhaps with "CPU Affinity"; on a machine of one chip, `NPU0`.
        if not labels and named and named[0] == words[0] and "X" not in words:
            labels = named
        elif labels and words[0] in labels:
            row = zip(labels, words[1:], strict=False)
            links[words[0]] = {other: link for other, link in row if other != words[0]}
    return links


def by_logical_number(reading: Reading) -> dict[int, Chip]:
    """Return the chips by the number that CANN counts by, ascending.

    Without `npu-smi info -m` it is the position in the table, which is in the same order.
    """
    chips = reading.info.chips
    if not reading.logical:
        return dict(enumerate(chips))
    numbered = ((reading.logical.get((one.npu, one.chip)), one) for one in chips)
    found = {number: one for number, one in numbered if number is not None}
    return dict(sorted(found.items()))


def label_of(chip: Chip, topology: Mapping[str, Mapping[str, str]]) -> str:
    """Return the label that `topology` gives a chip."""
    if any(label.startswith("Phy-ID") for label in topology):
        return f"Phy-ID{chip.physical}"
    return f"NPU{chip.npu if chip.physical is None else chip.physical}"


def _rows(text: str) -> list[list[str]]:
    """Return the cells of each line that has borders."""
    lines = (line.strip() for line in text.splitlines())
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|") and line.endswith("|")
    ]


def _chip(first: list[str], second: list[str], columns: list[str]) -> list[Chip]:
    """Return the chip of two rows, or nothing when they are not a chip's."""
    # The 950's table has a cell each for number and name, and none for the chip.
    number, _, name = " ".join(first[:-2]).partition(" ")
    numbers = second[0].split()
    if not (number.isdigit() and name.strip() and all(one.isdigit() for one in numbers)):
        return []
    column, used, total = _memory(second[-1], columns)
    words = first[-1].split()
    return [
        Chip(
            npu=int(number),
            chip=int(numbers[0]) if numbers else None,
            physical=int(numbers[1]) if len(numbers) > 1 else None,
            name=name.strip(),
            health=first[-2],
            temperature_celsius=_number(words[1]) if len(words) > 1 else None,
            memory_column=column,
            memory_used_bytes=used,
            memory_total_bytes=total,
            power_watts=_number(words[0]) if words else None,
        )
    ]


def _memory(cell: str, columns: list[str]) -> tuple[str, int | None, int | None]:
    """Return the column of the chip's own memory, and its used and total bytes.

    "MB" is 2**20 bytes: a chip of 64 GiB shows 65536. On a chip with HBM the column
    "Memory-Usage(MB)" tells of its control processor, and "HBM-Usage(MB)" of what tensors use.
    """
    usages = [column for column in columns if "Usage" in column]
    pairs = [(int(used), int(total)) for used, total in _USAGE.findall(cell)]
    found = [one for one in zip(usages, pairs, strict=False) if one[1][1] > 0]
    if not found:
        return "", None, None
    column, (used, total) = next((one for one in found if "HBM" in one[0]), found[-1])
    return column, used * MIB, total * MIB


def _process(cells: list[str]) -> list[Process]:
    """Return the process of one row, or nothing when it is none's."""
    numbers = cells[0].split()
    if len(cells) < 4 or not all(one.isdigit() for one in (*numbers, cells[1], cells[3])):
        return []
    chip = int(numbers[1]) if len(numbers) > 1 else None
    return [Process(int(numbers[0]), chip, int(cells[1]), cells[2], int(cells[3]) * MIB)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "NA" or "-"
        return None
