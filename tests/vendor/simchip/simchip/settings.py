"""What the environment says of the simulated chips: read by the driver and by mst's plugin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_DEVICES = 16
# Kinds of faults by what follows their name: see the table in README.md.
OPERATOR_FAULTS = {"fail": 0.0, "missing": 0.0, "nan": 0.0, "skew": 0.01}
NUMBER_FAULTS = ("lost", "slow", "stats", "capacity")
FLAG_FAULTS = ("leak", "oom", "seed", "rng_state", "collective")
DTYPES = ("bfloat16", "float16", "float32", "float64")
KINDS = (*OPERATOR_FAULTS, *NUMBER_FAULTS, *FLAG_FAULTS, "dtype", "lost_file")


class SettingsError(ValueError):
    """A SIMCHIP_ variable can't be understood."""


@dataclass(frozen=True)
class Fault:
    """One thing that is broken.

    Attributes:
        kind: one of `KINDS`.
        target: an operator ("aten::mm"), a dtype ("bfloat16") or a file; "" for the others.
        value: a count, a factor or microseconds; 0 for the others.
    """

    kind: str
    target: str = ""
    value: float = 0.0


@dataclass(frozen=True)
class Settings:
    """The simulated chips of this machine.

    Attributes:
        name: of torch's device type.
        devices: chips that are plugged in.
        visible: ordinals of those that this process may use; torch counts them from 0.
        memory_bytes: of each chip.
        bf16: whether they have bfloat16.
        faults: what is broken.
    """

    name: str
    devices: int
    visible: tuple[int, ...]
    memory_bytes: int
    bf16: bool
    faults: tuple[Fault, ...]


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return what the SIMCHIP_ variables of `environ` say.

    Raises:
        SettingsError: names the variable, its value and what it may be.
    """
    devices = _number(environ, "SIMCHIP_DEVICES", "0", MAX_DEVICES)
    bf16 = environ.get("SIMCHIP_BF16", "1")
    if bf16 not in {"0", "1"}:
        raise SettingsError(f"SIMCHIP_BF16={bf16!r}: 0 or 1")
    faults = parse_faults(environ.get("SIMCHIP_FAULT", ""))
    lost_file = environ.get("SIMCHIP_LOST_FILE", "")
    return Settings(
        name=environ.get("SIMCHIP_NAME") or "simchip",
        devices=devices,
        visible=_visible(environ.get("SIMCHIP_VISIBLE_DEVICES"), devices),
        memory_bytes=_number(environ, "SIMCHIP_MEMORY_BYTES", str(4 * 2**30), 2**50),
        bf16=bf16 == "1",
        faults=(*faults, Fault("lost_file", lost_file)) if lost_file else faults,
    )


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Return the faults of SIMCHIP_FAULT: "kind", "kind:argument", with commas between them.

    Raises:
        SettingsError: a kind is unknown, or its argument is missing or no number.
    """
    return tuple(_fault(part.strip()) for part in text.split(",") if part.strip())


def _fault(text: str) -> Fault:
    kind, _, argument = text.partition(":")
    try:
        if kind in FLAG_FAULTS and not argument:
            return Fault(kind)
        if kind in NUMBER_FAULTS and math.isfinite(float(argument)) and float(argument) >= 0:
            return Fault(kind, value=float(argument))
        if (kind == "dtype" and argument in DTYPES) or (kind == "lost_file" and argument):
            return Fault(kind, argument)
        if kind in OPERATOR_FAULTS and argument:
            operator, _, value = argument.partition("=")
            return Fault(kind, operator, float(value) if value else OPERATOR_FAULTS[kind])
    except ValueError:
        pass
    raise SettingsError(
        f"SIMCHIP_FAULT has {text!r}; it takes "
        + ", ".join(
            [f"{each}:OPERATOR" for each in OPERATOR_FAULTS]
            + [f"{each}:NUMBER" for each in NUMBER_FAULTS]
            + [*FLAG_FAULTS, f"dtype:{'|'.join(DTYPES)}", "lost_file:PATH"]
        )
    )


def _number(environ: Mapping[str, str], name: str, default: str, most: int) -> int:
    text = environ.get(name, default)
    if not text.isdecimal() or int(text) > most:
        raise SettingsError(f"{name}={text!r}: a whole number from 0 to {most}")
    return int(text)


def _visible(text: str | None, devices: int) -> tuple[int, ...]:
    """Return the ordinals of a list like "1,sim-0", up to the first that is absent, as CUDA."""
    if text is None:
        return tuple(range(devices))
    ordinals: list[int] = []
    for part in text.split(","):
        number = part.strip().removeprefix("sim-")
        if not number.isdecimal() or int(number) >= devices or int(number) in ordinals:
            break
        ordinals.append(int(number))
    return tuple(ordinals)
