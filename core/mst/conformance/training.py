"""Checks of training: `mst train` itself, on the device and on the CPU, step by step."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mst import rundir
from mst.conformance.findings import Context, Finding, skipped, verdict
from mst.conformance.processes import how, last_line, start, wait
from mst.conformance.subject import devices, is_reference
from mst.conformance.tiny import plan_arguments
from mst.durable import sha256
from mst.registry import PluginError

# The same sums in another order; seen on a simulated chip: 1e-6.
LOSS_TOLERANCE = 1e-5
# 16-bit products over four steps of a model with losses near 5.6.
LOW_PRECISION_TOLERANCE = 0.05
_TRAIN_SECONDS = 200.0
_STOPPED_AT = "step-00000002"


def losses_match(context: Context) -> Finding:
    """Check that four float32 steps on the device have the losses of the CPU."""
    subject = context.subject
    if is_reference(subject):
        return skipped("the CPU is the reference; it has nothing to be compared with")
    if "float32" not in devices(subject)[0].dtypes:
        return skipped("the device does not declare float32; losses are compared in 16 bits only")
    wanted = losses(_trained(context, "cpu", "float32"))
    found = losses(_trained(context, subject.name, "float32"))
    return verdict(
        loss_faults(found, wanted, LOSS_TOLERANCE),
        "the operator checks tell which kernel is off; run them with --only",
        f"{len(found)} losses within {LOSS_TOLERANCE:g} of the CPU's,"
        f" {found[0]:.6f} to {found[-1]:.6f}",
        losses=found,
        reference=wanted,
    )


def low_precision_matches(context: Context) -> Finding:
    """Check that each 16-bit dtype trains with finite losses near those of float32."""
    declared = devices(context.subject)[0].dtypes
    names = [one for one in ("bfloat16", "float16") if one in declared]
    if not names:
        return skipped("the device declares no 16-bit dtype")
    wanted = losses(_trained(context, "cpu", "float32"))
    faults, found = [], {}
    for name in names:
        found[name] = losses(_trained(context, context.subject.name, name))
        faults += [
            f"{name}: {fault}"
            for fault in loss_faults(found[name], wanted, LOW_PRECISION_TOLERANCE)
        ]
    return verdict(
        faults,
        "check autocast and the 16-bit kernels, or do not declare the dtype",
        f"{', '.join(names)}: losses within {LOW_PRECISION_TOLERANCE:.0%} of float32",
        losses=found,
        reference=wanted,
    )


def resume_continues(context: Context) -> Finding:
    """Check that a run killed after step 2 and resumed ends as the uninterrupted one."""
    subject = context.subject
    dtype = "float32" if "float32" in devices(subject)[0].dtypes else "auto"
    whole = _trained(context, subject.name, dtype)
    copy = _killed_copy(whole, context.workspace / "resumed")
    context.at("--resume")
    _mst(["train", "--output-dir", str(copy), "--resume"])
    wanted, found = losses(whole), losses(copy)
    faults = loss_faults(found, wanted, LOSS_TOLERANCE)
    same = sha256(_adapter(copy)) == sha256(_adapter(whole))
    return verdict(
        faults,
        "give back the optimizer's, the weights' and the generator's state exactly",
        "a resumed run ends "
        + ("byte for byte as" if same else "within rounding, not byte for byte, as")
        + " the uninterrupted one",
        losses=found,
        uninterrupted=wanted,
        same_bytes=same,
    )


def losses(run: Path) -> list[float]:
    """Return the loss of each step of a run, in order."""
    lines = (run / rundir.METRICS).read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return [one["loss"] for one in sorted(steps, key=lambda one: one["step"]) if "loss" in one]


def loss_faults(found: Sequence[float], wanted: Sequence[float], tolerance: float) -> list[str]:
    """Return the first step whose loss is not finite or too far off, in words."""
    if len(found) != len(wanted):
        return [f"{len(found)} losses were written, not {len(wanted)}"]
    for step, (value, reference) in enumerate(zip(found, wanted, strict=True), start=1):
        if not math.isfinite(value):
            return [f"the loss of step {step} is {value}"]
        if abs(value - reference) > tolerance * max(1.0, abs(reference)):
            return [
                f"the loss of step {step} is {value:.6f}, not {reference:.6f}"
                f" (off by {abs(value - reference):.1e})"
            ]
    return []


def _trained(context: Context, device: str, dtype: str) -> Path:
    """Return the run directory of four steps; each is trained once a run of the kit."""
    run = context.workspace / f"run-{device}-{dtype}"
    if not run.exists():
        context.at(f"mst train --device {device} --dtype {dtype}")
        arguments = plan_arguments(context.workspace, device, dtype)
        try:
            _mst(["train", *arguments, "--output-dir", str(run)])
        except PluginError:
            shutil.rmtree(run, ignore_errors=True)
            raise
    return run


def _mst(arguments: list[str]) -> None:
    """Run `mst`.

    Raises:
        PluginError: it failed; has its last line.
    """
    ended = wait(start("mst", arguments, os.environ), _TRAIN_SECONDS)
    shown = " ".join(one for one in arguments if not one.startswith("/"))
    if ended.code is None:
        raise PluginError(f"`mst {shown[:60]} …` did not end in {_TRAIN_SECONDS:g} s")
    if ended.code != 0:
        told = last_line(ended.errors) or last_line(ended.output)
        raise PluginError(f"`mst {shown[:60]} …` {how(ended.code)}: {told}")


def _killed_copy(run: Path, target: Path) -> Path:
    """Copy a finished run as it was when its second step had been saved, and kill it there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run, target)
    for checkpoint in (target / rundir.CHECKPOINTS).iterdir():
        if checkpoint.name != _STOPPED_AT:
            shutil.rmtree(checkpoint)
    shutil.rmtree(target / "adapter")
    lines = (target / rundir.METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    (target / rundir.METRICS).write_text("".join(lines[:2]), encoding="utf-8")
    rundir.update_manifest(target, status="running", finished=None, results={}, outputs={})
    return target


def _adapter(run: Path) -> Path:
    return run / "adapter" / "adapter_model.safetensors"
