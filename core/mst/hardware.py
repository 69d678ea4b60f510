"""Hardware that one doesn't own, from its name: `mst plan --on a100-80gb:4`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from mst.catalogue import KnownChip, cited, known_chips
from mst.errors import UsageError
from mst.facts import Capabilities, DeviceFacts
from mst.registry import PLUGIN_SECONDS, Registry, guarded

GIB = 2**30
# What a machine of its own leaves a job: the driver's and the desktop's share, as nvidia-smi shows
# a few hundred MiB in use on an idle card.
FREE_SHARE = 0.98
MOST = 1024
_CPU = re.compile(r"cpu-(\d+)c-(\d+)gb(?:-([a-z0-9_]+))?(?:@(\d+(?:\.\d+)?)ghz)?")


@dataclass(frozen=True)
class Hardware:
    """A machine that was named, not probed.

    Attributes:
        backend: the backend of its devices.
        devices: all alike.
        capabilities: of each.
        host_bytes: the host's memory; None when it was not named.
        note: how the name was understood.
    """

    backend: str
    devices: tuple[DeviceFacts, ...]
    capabilities: tuple[Capabilities, ...]
    host_bytes: int | None
    note: str


def read_hardware(text: str, registry: Registry) -> Hardware:
    """Return the machine that `text` names.

    Args:
        text: "CHIP[:COUNT][+cpu-CORESc-MEMORYgb]" or "cpu-CORESc-MEMORYgb[-FEATURE][@CLOCKghz]",
            as in "a100-80gb:4", "rtx-3090:2+cpu-32c-128gb" and "cpu-16c-64gb-amx_bf16@2.6ghz".
            Chips are those of the catalogue (`mst devices --known`), named by the parts that tell
            them.
        registry: asked what each backend's devices can do.

    Raises:
        UsageError: no such chip; names the nearest.
    """
    chip_text, _, host_text = text.strip().lower().partition("+")
    host = _cpu(host_text) if host_text else None
    if chip_text.startswith("cpu-"):
        device = _cpu(chip_text)
        able = _capabilities(registry, device)
        note = f"{chip_text} read as {device.name}"
        return Hardware("cpu", (device,), (able,), device.memory_free_bytes, note)
    name, _, count_text = chip_text.partition(":")
    if count_text and not (count_text.isdigit() and 1 <= int(count_text) <= MOST):
        raise UsageError(
            f"--on {text}: the number of chips after ':' must be 1 to {MOST}, not {count_text!r}."
        )
    count = int(count_text or 1)
    chip = _chip(name, text)
    devices = tuple(_device(chip, index, count) for index in range(count))
    able = _capabilities(registry, devices[0])
    host_bytes = host.memory_free_bytes if host else None
    note = f"{name} read as {chip.name} of the catalogue{_namesakes(chip)}"
    return Hardware(chip.backend, devices, (able,) * count, host_bytes, note)


def _namesakes(chip: KnownChip) -> str:
    """Return which other chips begin with the same name, for a note."""
    others = [
        each.name
        for each in known_chips()
        if each.name.startswith(chip.name) and each.name != chip.name
    ]
    return f"; there are also {', '.join(others)}" if others else ""


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]*\d+[a-z0-9]*|[a-z]+", name.lower())


def _chip(name: str, text: str) -> KnownChip:
    """Return the first chip of the catalogue all of whose sought words it has."""
    wanted = _words(name)
    chips = [each for each in known_chips() if each.memory_bytes is not None]
    exact = [each for each in chips if _squashed(each.name) == _squashed(name)]
    found = exact or [
        each
        for each in chips
        if wanted and all(any(_same(word, part) for part in _words(each.name)) for word in wanted)
    ]
    if found:
        return found[0]
    near = difflib.get_close_matches(name, [each.name.lower() for each in chips], 3, 0.3)
    raise UsageError(
        f"--on {text}: no chip of the catalogue is called {name!r}."
        f" Nearest: {', '.join(near) or ', '.join(each.name.lower() for each in chips[:3])}."
        " `mst devices --known` lists all; a CPU is written cpu-16c-64gb."
    )


def _squashed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _same(word: str, part: str) -> bool:
    # "80g" and "80gb" are the same size; "a100" is not "a10".
    return word == part or (word.rstrip("b") == part.rstrip("b") and word.rstrip("b")[-1:] == "g")


def _device(chip: KnownChip, index: int, count: int) -> DeviceFacts:
    assert chip.memory_bytes is not None
    total = int(chip.memory_bytes.value)
    links = {}
    if chip.link_bytes_per_second is not None:
        links = {f"{chip.backend}:{i}": "NVLink" for i in range(count) if i != index}
    figure = chip.memory_bytes
    table = {"memory_total_bytes": figure, "memory_free_bytes": figure}
    bandwidth = chip.bandwidth_bytes_per_second
    if bandwidth is not None:
        table["bandwidth_bytes_per_second"] = bandwidth
    sources = {key: cited(each) for key, each in table.items()}
    for each in list(chip.peak_tflops.values())[:1]:
        sources["peak_tflops"] = cited(each)
    return DeviceFacts(
        backend=chip.backend,
        index=index,
        name=chip.names[0],
        arch=chip.arch,
        memory_total_bytes=total,
        memory_free_bytes=int(total * FREE_SHARE),
        dtypes=chip.dtypes,
        peak_tflops={name: each.value for name, each in chip.peak_tflops.items()},
        bandwidth_bytes_per_second=bandwidth.value if bandwidth else None,
        links=links,
        sources=sources,
    )


def _cpu(text: str) -> DeviceFacts:
    found = _CPU.fullmatch(text)
    if found is None:
        raise UsageError(
            f"--on … {text}: a CPU is written cpu-CORESc-MEMORYgb, as in cpu-16c-64gb, with a"
            " feature such as -amx_bf16 or -avx512_bf16 where it has one, and its clock: @2.6ghz."
        )
    cores, size, feature = int(found[1]), int(found[2]) * GIB, found[3] or "avx2"
    chips = {name: chip for chip in known_chips() if chip.backend == "cpu" for name in chip.names}
    if feature not in chips:
        raise UsageError(
            f"--on … {text}: no CPU feature {feature!r} in the catalogue (known:"
            f" {', '.join(sorted(chips))})."
        )
    chip = chips[feature]
    hertz = float(found[4] or 0) * 1e9
    peaks = {
        dtype: figure.value * hertz * cores / 1e12
        for dtype, figure in chip.flop_per_cycle.items()
        if hertz
    }
    return DeviceFacts(
        backend="cpu",
        index=0,
        name=f"a CPU with {cores} cores and {feature}",
        arch=chip.arch,
        memory_total_bytes=size,
        memory_free_bytes=int(size * FREE_SHARE),
        dtypes=chip.dtypes,
        compute_units=cores,
        features=(feature,),
        peak_tflops=peaks,
        sources={key: "named by --on" for key in ("memory_total_bytes", "compute_units")},
    )


def _capabilities(registry: Registry, device: DeviceFacts) -> Capabilities:
    """Ask the chip's backend what such a device can do, with what is installed here."""
    relay = registry.backends.get(device.backend)
    if relay is None:
        raise UsageError(
            f"--on: the {device.backend} backend, which drives {device.name}, is not installed"
            f" here (installed: {', '.join(registry.backends)})."
        )
    answer = guarded(lambda: relay.mst_capabilities(device=device), PLUGIN_SECONDS)
    assert isinstance(answer, Capabilities)
    return answer
