"""Which devices of this machine can tune a model, and how: the planner's answer, on usual rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mst.candidates import candidates
from mst.errors import MstError
from mst.facts import BackendReport, Capabilities, DeviceFacts, MachineFacts
from mst.model.facts import ModelFacts
from mst.ranking import choose
from mst.request import TrainRequest
from mst.space import open_space
from mst.workload import DataFacts

TUNERS = ("lora", "qlora", "full")
# A question and an answer of a customer service or a short report.
USUAL_TOKENS = 512
_USUAL_LABELS = 128
_ROWS = 16


@dataclass(frozen=True)
class Way:
    """One way to tune a model on the devices of one backend.

    Attributes:
        backend: of the devices.
        devices: how many of them it takes.
        tuner: of `TUNERS`.
        fits: it can be done here, with rows of `USUAL_TOKENS` one at a time.
        peak_bytes: of one device's memory; None when it was not worked out.
        why_not: "" when it fits.
    """

    backend: str
    devices: int
    tuner: str
    fits: bool
    peak_bytes: int | None = None
    why_not: str = ""


def ways_here(model: ModelFacts, machine: MachineFacts) -> tuple[Way, ...]:
    """Return every way to tune a model on every usable backend of a machine.

    Args:
        model: its shape.
        machine: as `mst.probe.machine_facts` returns it.
    """
    reports = [each for each in machine.backends if each.probe.usable]
    # The CPU's memory is the host's, into which others offload.
    hosts = [each.probe.devices[0] for each in reports if each.name == "cpu"]
    free = hosts[0].memory_free_bytes if hosts else None
    return tuple(_way(model, report, tuner, free) for report in reports for tuner in TUNERS)


def _way(model: ModelFacts, report: BackendReport, tuner: str, host_bytes: int | None) -> Way:
    request = TrainRequest(tuner=tuner, gradient_checkpointing="on", per_device_train_batch_size=1)
    devices: Sequence[DeviceFacts] = report.probe.devices
    able: Sequence[Capabilities] = report.capabilities
    try:
        space = open_space(devices, able, model, _usual_rows(model), request, host_bytes, None)
        found = candidates(space)
    except MstError as error:
        return Way(report.name, 1, tuner, False, None, str(error).partition(". ")[0])
    chosen = choose(found, None)
    if chosen is None:
        least = min(found, key=lambda each: each.memory.peak_bytes)
        return Way(report.name, least.devices, tuner, False, least.memory.peak_bytes, least.why_not)
    return Way(report.name, chosen.devices, tuner, True, chosen.memory.peak_bytes)


def _usual_rows(model: ModelFacts) -> DataFacts:
    length = min(USUAL_TOKENS, model.max_position_embeddings or USUAL_TOKENS)
    return DataFacts(
        lengths=(length,) * _ROWS,
        label_tokens=(min(_USUAL_LABELS, length),) * _ROWS,
        val_rows=0,
        answers=None,
        max_length=length,
        longest=length,
        deleted=0,
    )


def in_words(ways: Sequence[Way]) -> str:
    """Return the ways that can be taken here, as "cuda: lora, qlora; cpu: lora"."""
    names = dict.fromkeys(each.backend for each in ways)
    found = {
        name: [each.tuner for each in ways if each.backend == name and each.fits] for name in names
    }
    return "; ".join(f"{name}: {', '.join(tuners)}" for name, tuners in found.items() if tuners)
