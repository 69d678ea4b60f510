"""What this machine has to tune models with, in plain words."""

from __future__ import annotations

from mst.facts import DeviceFacts
from mst.menu.asking import BACK
from mst.menu.screen import heading, say, show_command
from mst.menu.session import Session, in_language, run_here
from mst.quantities import gib

_COMMANDS = {"doctor": ["doctor"], "devices": ["devices"], "seal": ["doctor", "--seal"]}


def show_machine(session: Session) -> None:
    """Show the devices, and let the person look closer."""
    words = session.words
    heading(words("machine.title"))
    show_command(["devices"])
    backends = session.facts().backends
    for report in backends:
        for device in report.probe.devices if report.probe.usable else ():
            say(_sentence(session, device))
        for problem in report.health:
            say(words("machine.problem", name=report.name, text=words.said(problem)))
        if report.probe.found and not report.probe.usable:
            say(words("machine.unusable", name=report.name, reason=words.said(report.probe.reason)))
    absent = [each.name for each in backends if not each.probe.found]
    if absent:
        say(words("machine.absent", names=", ".join(absent)))
    while True:
        choices = [(each, words(f"machine.{each}")) for each in _COMMANDS]
        chosen = session.choose(words("machine.question"), choices, BACK)
        if chosen == BACK:
            return
        arguments = in_language(words, _COMMANDS[chosen])
        show_command(arguments)
        run_here(arguments, words)


def _sentence(session: Session, device: DeviceFacts) -> str:
    words = session.words
    name = f"{device.backend}:{device.index} {device.name}"
    if device.memory_free_bytes is None or device.memory_total_bytes is None:
        return words("machine.device", name=name)
    return words(
        "machine.device_memory",
        name=name,
        free=gib(device.memory_free_bytes),
        total=gib(device.memory_total_bytes),
    )
