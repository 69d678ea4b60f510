"""Checks of loading and probing: the hooks that every `mst` command calls, before any torch."""

from __future__ import annotations

import os
from pathlib import Path

from mst import serial
from mst.conformance.findings import Context, Finding, failed, passed, verdict
from mst.conformance.observe import Observation, Stage
from mst.conformance.processes import ending, start, wait
from mst.conformance.subject import devices
from mst.registry import PLUGIN_SECONDS, PluginError

# The promise of `mst_probe`'s hookspec; PLUGIN_SECONDS is where mst gives up.
PROBE_SECONDS = 2.0
# All hooks once and the probe twice, each at its limit, and the start of Python.
_OBSERVE_SECONDS = 40.0
# Nobody can write here, root included; so it stands for any read-only working directory.
_READ_ONLY = Path("/proc")


def observed(context: Context, hostile: bool = False) -> tuple[Observation, str]:
    """Return what was seen of the hooks, once a run of the kit, and what they printed.

    Raises:
        PluginError: the process of the hooks crashed or hung.
    """
    name = "hostile" if hostile else "observed"
    target, printed = context.workspace / f"{name}.json", context.workspace / f"{name}.out"
    if not target.exists():
        environment = dict(os.environ)
        if hostile:
            for variable in ("HOME", "USER", "LOGNAME"):
                environment.pop(variable, None)
            environment["PATH"] = ""
        cwd = _READ_ONLY if hostile and _READ_ONLY.is_dir() else None
        arguments = [str(context.workspace), str(target)]
        child = start("mst.conformance.observe", arguments, environment, cwd)
        ended = wait(child, _OBSERVE_SECONDS)
        if ended.code != 0:
            raise PluginError(f"the process {ending(ended, _OBSERVE_SECONDS)}")
        printed.write_text(ended.output, encoding="utf-8")
    return serial.load(Observation, target), printed.read_text(encoding="utf-8")


def plugin_loads(context: Context) -> Finding:
    """Check that the entry point loads and its hooks are what the hookspec says."""
    subject = context.subject
    if subject.plugin is None:
        broken = [f"{one.distribution or one.name}: {one.reason}" for one in subject.claims]
        return failed(
            f"the plugin is not loaded: {'; '.join(broken)}",
            "make `python -c 'import <its module>'` work without a device, then see mst/hookspecs",
        )
    plugin = subject.plugin
    return passed(
        f"{plugin.name} of {plugin.distribution} {plugin.version} implements"
        f" {', '.join(hook.removeprefix('mst_') for hook in plugin.hooks)}",
        hooks=list(plugin.hooks),
    )


def name_is_its_own(context: Context) -> Finding:
    """Check that no other plugin claims the backend's name."""
    claims = [f"{one.status}: {one.reason}" for one in context.subject.claims]
    if context.subject.plugin is None:
        # One that failed to load is the other check's matter.
        claims = [one for one in claims if one.startswith("refused")]
    return verdict(
        claims,
        "uninstall one of the packages, or give the backend another name",
        f"one plugin is called {context.subject.name!r}",
    )


def probe_answers(context: Context) -> Finding:
    """Check that the probe never raises and finds a device that is usable."""
    try:
        observation, _ = observed(context)
        # What the other hooks raise is the matter of facts.* and environment.text.
        first = [one for one in observation.stages if one.hook in ("import", "mst_probe")]
        raised = [f"{one.hook} {one.error}" for one in first if one.error]
        if raised:
            advice = "catch it, and return Probe(found=…, usable=False, reason='what to mend')"
            return failed("; ".join(dict.fromkeys(raised)), advice)
        if any(one.fault for one in observation.stages):
            return passed("it answers; facts.typed says what is wrong with the answer")
        found = devices(context.subject)
    except PluginError as error:
        return failed(str(error), "mend what the reason names: what can't run can't be checked")
    return passed(f"{len(found)} usable: {', '.join(one.name for one in found)}")


def probe_is_light(context: Context) -> Finding:
    """Check that neither import nor probe nor any fact loads torch."""
    observation, _ = observed(context)
    faults = [
        f"{one.hook} imports {', '.join(one.imported)}"
        for one in observation.stages
        if one.imported
    ]
    return verdict(
        faults,
        "read files and vendor tools instead; only mst_activate may import torch",
        "no hook but mst_activate imports torch",
    )


def probe_is_fast(context: Context) -> Finding:
    """Check that the best of two probes takes less than 2 s, and no hook more than 5 s."""
    observation, _ = observed(context)
    probes = [one.seconds for one in observation.stages if one.hook == "mst_probe"]
    faults = [
        f"{one.hook} took {one.seconds:.1f} s; mst gives it up after {PLUGIN_SECONDS:g} s"
        for one in observation.stages
        if one.seconds > PLUGIN_SECONDS
    ]
    if probes and min(probes) > PROBE_SECONDS:
        faults.append(f"mst_probe took {min(probes):.1f} s; it promises {PROBE_SECONDS:g} s")
    best = min(probes, default=0.0)
    return verdict(
        faults,
        "ask fewer or faster tools, with a time limit of your own on each",
        f"{best * 1000:.0f} ms, the best of two",
        probe_seconds=probes,
    )


def probe_is_quiet(context: Context) -> Finding:
    """Check that the hooks print nothing on standard output."""
    _, printed = observed(context)
    text = " ".join(printed.split())
    faults = [f"printed {text[:120]!r} on standard output"] if text else []
    return verdict(faults, "write messages to standard error, or return them", "nothing printed")


def probe_repeats(context: Context) -> Finding:
    """Check that two probes in one process give the same answer."""
    observation, _ = observed(context)
    faults = [observation.changed] if observation.changed else []
    return verdict(
        faults,
        "keep no state between calls: a plan is checked against what was probed before",
        "two answers agree (free memory aside)",
    )


def _fault(stage: Stage) -> str:
    return f"{stage.hook} {stage.error}" if stage.error else stage.fault


def probe_survives(context: Context) -> Finding:
    """Check that the probe answers with an empty PATH, no HOME and a read-only directory."""
    usual = {_fault(one) for one in observed(context)[0].stages}
    observation, _ = observed(context, hostile=True)
    faults = sorted({_fault(one) for one in observation.stages} - usual - {""})
    return verdict(
        faults,
        "expect every tool and directory to be missing; say so in Probe.reason",
        "answers without PATH, HOME and a directory that can be written",
    )
