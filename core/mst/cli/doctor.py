"""`mst doctor`: check this machine, and say what to mend. It works when torch does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING

from mst.cache import cache_dir
from mst.cli.language import add_language_option, language_asked
from mst.facts import BackendReport, MachineFacts
from mst.probe import FAILED_PROBE, machine_facts
from mst.registry import BUILT_IN, PluginRecord, load
from mst.translation import translated

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

# A first import from a cold disk has been seen to take a minute.
TORCH_SECONDS = 120
# A base model in a cache and the checkpoints of one LoRA run.
LEAST_DISK_BYTES = 5 * 2**30
# The child leaves out the working directory, where a file may be called torch.py.
_IMPORT_TORCH = """
import json, sys
if sys.path[:1] == [""]:
    del sys.path[0]
try:
    import torch
    answer = {"version": torch.__version__, "file": torch.__file__}
except BaseException as error:
    causes = []
    while error is not None:
        causes.append(type(error).__name__ + ": " + " ".join(str(error).split()))
        error = error.__cause__ or error.__context__
    answer = {"causes": causes}
print("\\n" + json.dumps(answer))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: "ok", "warn" (training works, less well) or "fail" (training does not work).
        found: what was found.
        advice: what to do about it; "" when ok, or when `found` says so itself.
    """

    name: str
    status: str
    found: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mst doctor`."""
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument(
        "--seal",
        action="store_true",
        help="check the jail alone: which layer this machine gives, why, and what was tried",
    )
    add_language_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print one line a check; returns 1 when something that training needs is broken."""
    language = language_asked(args)
    if args.seal:
        return _seal(args.json, language)
    checks = list(all_checks(os.environ))
    failed = any(check.status == "fail" for check in checks)
    if args.json:
        plain = {"ok": not failed, "checks": [asdict(check) for check in checks]}
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _print_lines(checks, language)
    return 1 if failed else 0


def all_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield every check of this machine; `environ` is what the torch subprocess starts with."""
    yield from check_packages()
    registry = load()
    facts = machine_facts(registry)
    yield check_torch(environ, facts)
    yield from check_backends(facts)
    yield from check_plugins(registry.records)
    yield from check_host(facts, environ)
    yield check_directory("working directory", Path.cwd(), needed=True)
    yield check_directory("cache directory", cache_dir(), needed=False)


def check_packages() -> Iterator[Check]:
    """Yield a check of Python and of each package that mst-train's own metadata requires."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python = platform.python_version()
    try:
        own = importlib.metadata.metadata(BUILT_IN)
    except importlib.metadata.PackageNotFoundError:
        advice = "install it, so that its requirements are known: python -m pip install mst-train"
        yield Check("python", "ok", f"{python} at {sys.executable}")
        yield Check("packages", "warn", f"{BUILT_IN} runs without being installed", advice)
        return
    wanted = str(own["Requires-Python"])
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    advice = "" if fits else f"make an environment with Python {wanted} and install mst-train there"
    yield Check("python", "ok" if fits else "fail", f"{python} at {sys.executable}", advice)
    for text in own.get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        # The extras are for developers and benchmarks; no command of mst needs them.
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _check_package(requirement.name, requirement.specifier)


def _check_package(name: str, wanted: SpecifierSet) -> Check:
    advice = f"python -m pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", f"not installed; {wanted} is required", advice)
    if not wanted.contains(version, prereleases=True):
        return Check(name, "fail", f"{version}; {wanted} is required", advice)
    return Check(name, "ok", version)


def check_torch(environ: Mapping[str, str], facts: MachineFacts | None = None) -> Check:
    """Import torch in a subprocess and return what came of it.

    A vendor's extension that torch loads by itself can break `import torch`; a second attempt
    without such extensions tells whose fault it is.

    Args:
        environ: what the subprocess starts with.
        facts: what the backends report; a vendor's own knows best what its extension lacks.
    """
    answer = _import_torch(environ)
    if "version" in answer:
        return Check("import torch", "ok", f"{answer['version']} at {answer['file']}")
    alone = _import_torch({**environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    # torch's own error only wraps the extension's; the last cause is the root.
    causes = list(answer["causes"])
    found = causes[0] if len(causes) == 1 else f"{causes[0]} Cause: {causes[-1]}"
    reports = facts.backends if facts else ()
    ascend = next((report for report in reports if report.name == "ascend"), None)
    advice = _torch_advice(causes, works_alone="version" in alone, ascend=ascend)
    return Check("import torch", "fail", found, advice)


def _torch_advice(causes: list[str], works_alone: bool, ascend: BackendReport | None) -> str:
    text = " ".join(causes)
    if "libhccl" in text or "libascend" in text or "torch_npu" in text:
        return _torch_npu_advice(ascend)
    if works_alone:
        points = importlib.metadata.entry_points(group="torch.backends")
        names = sorted({point.dist.name if point.dist else point.name for point in points})
        return (
            f"torch imports without its extensions ({', '.join(names) or 'names unknown'}): "
            "repair or uninstall the one that is named in the error"
        )
    if "No module named 'torch'" in text:
        return "python -m pip install torch"
    if "cannot open shared object file" in text:
        return (
            "torch was built for libraries that are not here: install the build for this machine "
            "(https://pytorch.org/get-started/locally)"
        )
    return "python -m pip install --force-reinstall torch"


def _torch_npu_advice(ascend: BackendReport | None) -> str:
    """Return what to do about a torch-npu that breaks `import torch`: it lacks CANN's libraries."""
    uninstall = "python -m pip uninstall torch-npu"
    if ascend is not None and not ascend.probe.found:
        return (
            f"{uninstall}, for there is no Ascend chip (see backend ascend); where there is one, "
            "show the container its /dev/davinci* and load CANN's libraries: "
            "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
        )
    if ascend is not None and ascend.probe.reason:
        return ascend.probe.reason
    return (
        "load CANN's libraries: source /usr/local/Ascend/ascend-toolkit/set_env.sh; "
        f"where there is no Ascend chip: {uninstall}"
    )


def _import_torch(environ: Mapping[str, str]) -> dict[str, list[str] | str]:
    """Return {"version", "file"}, or {"causes"}: the exceptions, outermost first."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", _IMPORT_TORCH],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TORCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"causes": [f"`import torch` did not end in {TORCH_SECONDS} s"]}
    try:
        answer: dict[str, list[str] | str] = json.loads(child.stdout.splitlines()[-1])
        return answer
    except (IndexError, ValueError):
        died = child.returncode
        how = f"exit code {died}" if died >= 0 else f"signal {signal.Signals(-died).name}"
        last = child.stderr.strip().splitlines()[-1:]
        return {"causes": [": ".join([f"`import torch` ended Python with {how}", *last])]}


def check_backends(facts: MachineFacts) -> Iterator[Check]:
    """Yield a check of each backend, one of each health problem, and one of them together."""
    for report in facts.backends:
        yield _check_backend(report)
        for problem in report.health:
            yield Check(f"{report.name} health", "warn", problem)
    if not any(report.probe.usable for report in facts.backends):
        names = ", ".join(report.name for report in facts.backends) or "none"
        advice = "mend what the lines above name; `mst plugins` says which backends failed to load"
        yield Check("devices", "fail", f"no usable device (backends: {names})", advice)


def _check_backend(report: BackendReport) -> Check:
    name, probe = f"backend {report.name}", report.probe
    if probe.usable:
        devices = ", ".join(f"{one.backend}:{one.index} {one.name}" for one in probe.devices)
        return Check(name, "ok", devices)
    if probe.found:
        return Check(name, "warn", "found, but not usable", probe.reason or "it gives no reason")
    if probe.reason.startswith(FAILED_PROBE):
        return Check(name, "warn", probe.reason, "upgrade or uninstall its package: `mst plugins`")
    return Check(name, "ok", f"not here: {probe.reason or 'it gives no reason'}")


def check_plugins(records: tuple[PluginRecord, ...]) -> Iterator[Check]:
    """Yield a check of each plugin that is not used, or one that all are."""
    broken = [record for record in records if record.status != "ok"]
    for record in broken:
        package = f"{record.distribution or 'unknown package'} {record.version}".rstrip()
        # A refusal says itself what to do.
        advice = f"upgrade or uninstall {package}" if record.status == "failed" else ""
        found = f"{record.status}: {record.reason}"
        yield Check(f"plugin {record.name}", "warn", found, advice)
    if not broken:
        yield Check("plugins", "ok", f"{len(records)} found, all load")


def check_host(facts: MachineFacts, environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield how much memory and how many threads a job on the CPU would have."""
    cpu = next((report for report in facts.backends if report.name == "cpu"), None)
    if cpu is None or not cpu.probe.devices:
        advice = "mend the cpu backend: `mst plugins` says why it is not loaded"
        yield Check("memory and threads", "warn", "unknown", advice)
        return
    device = cpu.probe.devices[0]
    if device.memory_free_bytes is not None and device.memory_total_bytes is not None:
        free, total = device.memory_free_bytes / 2**30, device.memory_total_bytes / 2**30
        source = device.sources["memory_free_bytes"]
        yield Check("memory", "ok", f"{free:.1f} GiB free of {total:.1f} ({source})")
    threads = f"{device.compute_units} ({device.sources['compute_units']})"
    shell = environ.get("OMP_NUM_THREADS", "")
    if shell not in ("", str(device.compute_units)):
        threads = "; ".join(
            (threads, f"the shell's OMP_NUM_THREADS={shell} is replaced in workers")
        )
    yield Check("threads", "ok", threads)


def check_directory(name: str, path: Path, needed: bool) -> Check:
    """Return whether one can write below `path`, and how much room there is.

    Writes a nameless temporary file into the nearest parent that exists: permissions alone do
    not tell of read-only mounts and quotas.

    Args:
        name: what the directory is for.
        path: the directory; need not exist yet.
        needed: training cannot do without it.
    """
    parent = next(one for one in (path, *path.parents) if os.path.exists(one))
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"mst")
            file.flush()
    except OSError as error:
        advice = "change to a directory you own" if needed else f"make it writable: {parent}"
        found = f"{path} cannot be written: {error.strerror or error}"
        return Check(name, "fail" if needed else "warn", found, advice)
    free = disk_usage(parent).free
    found = f"{path}, {free / 2**30:.1f} GiB free"
    if free < LEAST_DISK_BYTES:
        advice = f"free some space: a run with checkpoints may need {LEAST_DISK_BYTES >> 30} GiB"
        return Check(name, "warn", found, advice)
    return Check(name, "ok", found)


def _seal(as_json: bool, language: str) -> int:
    """Print what the jail is on this machine; returns 1 when there is none."""
    from mst.seal.jail.advice import what_to_do
    from mst.seal.jail.survey import survey

    found = survey()
    first = found[0]
    if as_json:
        plain = {"ok": first.seal is not None, "asked": [each.to_json() for each in found]}
        print(json.dumps(plain, indent=2, ensure_ascii=False))
        return 0 if first.seal else 1
    checks = []
    for each in found:
        if each.seal is None:
            status = "fail" if each is first else "warn"
            checks.append(Check(f"--jail {each.asked}", status, each.fault))
            continue
        seal = each.seal
        words = f"{seal.layer}: {seal.line().removeprefix('seal').strip()}"
        checks.append(Check(f"--jail {each.asked}", "ok", f"{words}; {seal.user}"))
        if each is first:
            checks += [Check(f"not {layer}", "ok", why) for layer, why in seal.refused]
            limited = "ok" if seal.files.startswith("Landlock") else "warn"
            checks.append(Check("files written", limited, seal.files))
            judge = "the broker judges them" if seal.unix == "broker" else "all are refused"
            checks.append(Check("unix sockets", "ok", judge))
            checks += [Check(f"way out: {way.name}", "ok", way.found) for way in seal.ways]
    if first.seal is None:
        checks.append(Check("to do", "fail", what_to_do(os.uname().machine)))
    _print_lines(checks, language)
    return 0 if first.seal else 1


def _print_lines(checks: list[Check], language: str) -> None:
    from rich.cells import set_cell_size
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, highlight=False, emoji=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        status, name, found = (
            translated(each, language) for each in (check.status, check.name, check.found)
        )
        line = Text(set_cell_size(status, 5), style=styles[check.status])
        line.append(f"{name}: {found}", style="default")
        if check.advice:
            to_do, advice = translated("To do", language), translated(check.advice, language)
            line.append(f". {to_do}: {advice}", style="default")
        console.print(line, soft_wrap=True)
