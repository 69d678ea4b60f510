"""Probing: every backend's answer becomes a report, and a device is chosen from reports only."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from mst.errors import NoDeviceError
from mst.facts import BackendReport, Capabilities, DeviceFacts, MachineFacts, Probe
from mst.hookspecs import hookimpl
from mst.probe import activate, backend_environment, machine_facts, select_device, type_fault
from mst.registry import PluginError, Registry, load

GIB = 2**30


def device(backend: str, index: int = 0, name: str = "a chip") -> DeviceFacts:
    return DeviceFacts(backend, index, name, "arch", 80 * GIB, 79 * GIB, ("bfloat16",))


def report(backend: str, torch_device: str, count: int) -> BackendReport:
    devices = tuple(device(backend, index) for index in range(count))
    capabilities = Capabilities(torch_device, "gloo")
    return BackendReport(backend, Probe(True, True, devices), (capabilities,) * count)


CPU = report("cpu", "cpu", 1)
A100_4 = report("cuda", "cuda", 4)
ASCEND = report("ascend", "npu", 2)
NO_CUDA = BackendReport("cuda", Probe(False, False, reason="no /dev/nvidia*."))
ASCEND_WITHOUT_CANN = BackendReport(
    "ascend",
    Probe(True, False, (device("ascend"),), "CANN is not loaded: source set_env.sh"),
)


def machine(*reports: BackendReport) -> MachineFacts:
    return MachineFacts("Linux", "3.11.7", reports)


@pytest.mark.parametrize(
    ("reports", "asked", "chosen"),
    [
        ((CPU,), "auto", ("cpu", 0)),
        ((CPU, A100_4), "auto", ("cuda", 0)),
        ((ASCEND, CPU, A100_4), "auto", ("ascend", 0)),
        ((ASCEND_WITHOUT_CANN, CPU, A100_4), "auto", ("cuda", 0)),
        ((ASCEND_WITHOUT_CANN, CPU, NO_CUDA), "auto", ("cpu", 0)),
        ((CPU, A100_4), "cpu", ("cpu", 0)),
        ((CPU, A100_4), "cuda", ("cuda", 0)),
        ((CPU, A100_4), "cuda:3", ("cuda", 3)),
        ((CPU, A100_4, ASCEND), "npu", ("ascend", 0)),
        ((CPU, A100_4, ASCEND), "npu:1", ("ascend", 1)),
        ((CPU, A100_4, ASCEND), "ascend:1", ("ascend", 1)),
        # A ROCm backend drives "cuda" in torch; the backend's own name comes first.
        ((report("rocm", "cuda", 1), A100_4), "cuda", ("cuda", 0)),
        ((report("rocm", "cuda", 1), CPU), "cuda", ("rocm", 0)),
    ],
)
def test_a_device_is_chosen(
    reports: tuple[BackendReport, ...], asked: str, chosen: tuple[str, int]
) -> None:
    backend, one, capabilities = select_device(machine(*reports), asked)

    assert (one.backend, one.index) == chosen
    assert backend.name == chosen[0]
    assert capabilities in backend.capabilities


@pytest.mark.parametrize(
    ("reports", "asked", "words"),
    [
        ((CPU, NO_CUDA), "cuda", ["'cuda'", "found: cpu:0", "cuda: no /dev/nvidia*. Pass"]),
        ((CPU, ASCEND_WITHOUT_CANN), "npu", ["'npu'", "ascend: CANN is not loaded"]),
        ((CPU, ASCEND_WITHOUT_CANN), "ascend:0", ["'ascend:0'", "CANN is not loaded"]),
        ((CPU, A100_4), "cuda:7", ["'cuda:7'", "cuda:3)", "cuda has 4"]),
        ((CPU, A100_4), "cuda:", ["'cuda:'", "--device auto"]),
        ((CPU, A100_4), "cuda:x", ["'cuda:x'"]),
        ((CPU,), "tpu", ["no backend is called 'tpu'", "--device auto", "`mst doctor`"]),
        ((NO_CUDA,), "auto", ["'auto'", "found: none", "Run `mst doctor`"]),
        ((), "auto", ["found: none"]),
    ],
)
def test_a_device_that_is_not_usable_is_an_error_and_never_the_cpu(
    reports: tuple[BackendReport, ...], asked: str, words: list[str]
) -> None:
    with pytest.raises(NoDeviceError) as caught:
        select_device(machine(*reports), asked)

    assert [word for word in words if word not in str(caught.value)] == []


@dataclass
class Vendor:
    """A backend whose answers a test sets; an exception is raised, a number is a delay."""

    probe: object
    capabilities: object = None
    health: object = None
    environment: object = None
    activation: object = None

    @hookimpl
    def mst_backend_name(self) -> str:
        return "acme"

    @hookimpl
    def mst_probe(self) -> object:
        return answer(self.probe)

    @hookimpl
    def mst_capabilities(self, device: DeviceFacts) -> object:
        return answer(self.capabilities)

    @hookimpl
    def mst_health(self, device: DeviceFacts) -> object:
        return answer(self.health)

    @hookimpl
    def mst_environment(self, devices: Sequence[DeviceFacts]) -> object:
        return answer(self.environment)

    @hookimpl
    def mst_activate(self) -> object:
        return answer(self.activation)


def answer(value: object) -> object:
    if isinstance(value, BaseException):
        raise value
    if isinstance(value, float):
        time.sleep(value)
    return value


def registry_of(monkeypatch: pytest.MonkeyPatch, vendor: Vendor) -> Registry:
    """Load this vendor's backend beside the built-in CPU."""
    module = types.ModuleType("mst_vendor_of_test_probe")
    vars(module)["plugin"] = vendor
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = [
        EntryPoint("acme", f"{module.__name__}:plugin", "mst"),
        EntryPoint("cpu", "mst_backends.cpu", "mst"),
    ]
    return load(points)


GOOD = Probe(True, True, (device("acme"), device("acme", 1)))
SOUND = Capabilities("acmedev", "accl")


def test_a_sound_backend_is_reported_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD, SOUND, ["fan is slow: clean it"]))

    acme, cpu = machine_facts(registry).backends

    assert acme == BackendReport("acme", GOOD, (SOUND, SOUND), ("fan is slow: clean it",) * 2)
    assert (cpu.name, cpu.probe.usable) == ("cpu", True)
    assert cpu.capabilities[0].torch_device == "cpu"


def test_hooks_that_are_left_out_mean_nothing_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD, SOUND))

    assert machine_facts(registry).backends[0].health == ()
    assert backend_environment(registry, "acme", GOOD.devices) == {}


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (OSError("acme-smi: permission denied"), "OSError: acme-smi: permission denied"),
        (SystemExit(1), "SystemExit: 1"),
        (None, "its answer is NoneType None, not Probe"),
        ({"found": True}, "its answer is dict {'found': True}, not Probe"),
        (Probe(True, "yes"), "its answer.usable is str 'yes', not bool"),  # type: ignore[arg-type]
        (
            Probe(True, True, [device("acme")]),  # type: ignore[arg-type]
            "not tuple",
        ),
        (
            Probe(True, True, ("acme:0",)),  # type: ignore[arg-type]
            "its answer.devices[0] is str 'acme:0', not DeviceFacts",
        ),
        (
            Probe(True, True, (DeviceFacts("acme", 0, "A", "a", "16 GiB", 1, ("float32",)),)),  # type: ignore[arg-type]
            "its answer.devices[0].memory_total_bytes is str '16 GiB', not int",
        ),
        (
            Probe(True, True, (DeviceFacts("acme", 0, "A", "a", 1, 1, "float32"),)),  # type: ignore[arg-type]
            "its answer.devices[0].dtypes is str 'float32', not tuple",
        ),
        (Probe(True, True, (device("cuda"),)), "devices[0] is called cuda:0, not acme:0"),
        (Probe(True, True, (device("acme", 1),)), "devices[0] is called acme:1, not acme:0"),
        (Probe(True, True), "usable, but has no device"),
        (
            Probe(True, True, (DeviceFacts("acme", 0, "A", "a", 1, 1, ()),)),
            "devices[0] has no dtype",
        ),
    ],
)
def test_a_probe_that_fails_is_reported_and_the_cpu_still_found(
    monkeypatch: pytest.MonkeyPatch, probe: object, reason: str
) -> None:
    registry = registry_of(monkeypatch, Vendor(probe, SOUND))

    acme, cpu = machine_facts(registry).backends

    assert (acme.probe.found, acme.probe.usable, acme.probe.devices) == (False, False, ())
    assert acme.probe.reason.startswith("mst_probe: ")
    assert reason in acme.probe.reason
    assert acme.capabilities == ()
    assert cpu.probe.usable


def test_a_probe_that_is_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(monkeypatch, Vendor(60.0, SOUND))

    started = time.monotonic()
    acme, cpu = machine_facts(registry, seconds=1.0).backends

    assert time.monotonic() - started < 20
    assert acme.probe.reason == "mst_probe: did not answer in 1 s"
    assert cpu.probe.usable


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        (None, "mst_capabilities: its answer is NoneType None, not Capabilities"),
        (ValueError("unknown revision"), "mst_capabilities: ValueError: unknown revision"),
        (
            Capabilities("acme", "accl", strategies="single"),  # type: ignore[arg-type]
            "mst_capabilities: its answer.strategies is str 'single', not tuple",
        ),
    ],
)
def test_without_capabilities_a_device_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, capabilities: object, reason: str
) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD, capabilities))

    facts = machine_facts(registry)

    assert facts.backends[0].probe == Probe(True, False, GOOD.devices, reason)
    assert facts.backends[0].capabilities == ()
    assert select_device(facts, "auto")[1].backend == "cpu"


@pytest.mark.parametrize(
    ("health", "problem"),
    [
        (RuntimeError("smi crashed"), "mst_health: RuntimeError: smi crashed"),
        ("hot", "mst_health: its answer is str 'hot', not Sequence"),
        ([7], "mst_health: its answer[0] is int 7, not str"),
    ],
)
def test_a_health_check_that_fails_is_a_problem_of_a_usable_device(
    monkeypatch: pytest.MonkeyPatch, health: object, problem: str
) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD, SOUND, health))

    acme = machine_facts(registry).backends[0]

    assert acme.probe.usable
    assert acme.health == (problem, problem)


def test_the_environment_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD, SOUND, environment={"ACME_THREADS": "4"}))

    assert backend_environment(registry, "acme", GOOD.devices) == {"ACME_THREADS": "4"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACME_THREADS": 4}, "mst_environment's answer['ACME_THREADS'] is int 4, not str"),
        (["ACME=1"], "is list ['ACME=1'], not Mapping"),
        (RuntimeError("no licence"), "RuntimeError: no licence"),
    ],
)
def test_an_environment_that_fails_stops_the_job(
    monkeypatch: pytest.MonkeyPatch, environment: object, words: str
) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD, SOUND, environment=environment))

    with pytest.raises(PluginError, match="the acme backend gave no environment") as caught:
        backend_environment(registry, "acme", GOOD.devices)

    assert words in str(caught.value)


def test_activation_that_fails_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD, activation=OSError("libacme.so")))

    with pytest.raises(PluginError, match=r"acme backend could not be activated: OSError: libacme"):
        activate(registry, "acme")
    activate(registry, "cpu")


def test_a_backend_that_is_not_installed_is_named_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = registry_of(monkeypatch, Vendor(GOOD))

    with pytest.raises(PluginError, match=r"no backend 'cuda' .*installed: acme, cpu.*mst plugins"):
        activate(registry, "cuda")


@pytest.mark.parametrize(
    ("value", "kind", "fault"),
    [
        (1, float, ""),
        (True, int, "x is bool True, not int"),
        (True, bool, ""),
        (None, float | None, ""),
        ("1", float | None, "x is str '1', not float"),
        ({"bfloat16": 312}, Mapping[str, float], ""),
        ({"bfloat16": "312"}, Mapping[str, float], "x['bfloat16'] is str '312', not float"),
        ({16: 312.0}, Mapping[str, float], "key of x is int 16, not str"),
        (("a", 1), tuple[str, ...], "x[1] is int 1, not str"),
    ],
)
def test_types_are_told_apart(value: object, kind: object, fault: str) -> None:
    assert type_fault(value, kind, "x") == fault
