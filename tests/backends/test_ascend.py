"""The Ascend backend, on recorded outputs of npu-smi and trees that stand for a machine's files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mst import catalogue
from mst.facts import DeviceFacts, Probe, Telemetry
from mst.probe import type_fault
from mst_backends import ascend, npu_smi
from mst_backends.ascend_health import problems, telemetry
from mst_backends.ascend_soc import dtypes_of, is_known, soc_name
from mst_backends.cann import Extension, find_cann
from mst_backends.npu_smi import MIB, Reading

RECORDED = Path(__file__).parents[1] / "data/npu_smi"
TOOLKIT = "usr/local/Ascend/ascend-toolkit"
TORCH_NPU = Extension(installed=True, version="2.13.0", torch_version="2.13.0+cpu")
BF16 = ("bfloat16", "float16", "float32")
NO_BF16 = ("float16", "float32")


def recorded(name: str) -> str:
    return (RECORDED / name).read_text(encoding="utf-8")


def reading(name: str, topology: str = "", mapping: str = "", board: str = "") -> Reading:
    info = npu_smi.parse_info(recorded(name))
    return Reading(
        info=info,
        logical=npu_smi.parse_mapping(recorded(mapping)) if mapping else {},
        topology=npu_smi.parse_topology(recorded(topology)) if topology else {},
        boards={info.chips[0].name: board} if board else {},
    )


def machine(root: Path, nodes: int = 8, cann: bool = True, driver: bool = True) -> dict[str, str]:
    """Write the files of a machine and return the variables of a shell on it."""
    (root / "dev").mkdir(parents=True)
    for name in ("davinci_manager", *(f"davinci{one}" for one in range(nodes))):
        (root / "dev" / name).touch()
    if driver:
        (root / "usr/local/Ascend/driver").mkdir(parents=True)
        (root / "usr/local/Ascend/driver/version.info").write_text("Version=25.5.2\npackage=x\n")
    if not cann:
        return {}
    libraries = root / TOOLKIT / "latest/lib64"
    for folder in ("lib64", "opp", "runtime", "compiler"):
        (root / TOOLKIT / "latest" / folder).mkdir(parents=True)
    (libraries / "libhccl.so").touch()
    (root / TOOLKIT / "set_env.sh").touch()
    about = root / TOOLKIT / "latest/x86_64-linux"
    about.mkdir()
    (about / "ascend_toolkit_install.info").write_text("package_name=toolkit\nversion=8.5.0\n")
    return {
        "ASCEND_HOME_PATH": str(root / TOOLKIT / "latest"),
        "ASCEND_OPP_PATH": str(root / TOOLKIT / "latest/opp"),
        "LD_LIBRARY_PATH": f"/nowhere:{libraries}",
    }


def probe(
    root: Path,
    name: str = "910b3_24.1.rc1.txt",
    variables: Mapping[str, str] | None = None,
    extension: Extension = TORCH_NPU,
) -> Probe:
    """Probe a machine that has everything, whose npu-smi prints the recorded table."""
    environ = machine(root)
    return ascend.read_probe(root, {**environ, **(variables or {})}, reading(name), extension)


@pytest.mark.parametrize(
    ("name", "npus", "chips", "physical", "names", "celsius", "used", "total"),
    [
        ("910a_23.0.rc2.txt", [3], [0], [None], "910A", 26, 0, 32768),
        ("910prob_24.1.0.txt", [0, 1], [0, 0], [None] * 2, "910ProB", 38, 8, 32768),
        ("910b3_24.1.rc1.txt", [0, 1, 2, 3], [0] * 4, [None] * 4, "910B3", 40, 3314, 65536),
        ("910b4_26.0.rc1.txt", [0, 1], [0, 0], [None] * 2, "910B4", 51, 8046, 32768),
        ("910b4-1_25.2.0.txt", [0], [0], [None], "910B4-1", 33, 3197, 65536),
        ("910c_25.2.1.txt", [0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 3], "Ascend910", 36, 3193, 65536),
        ("910c_26.0.rc2_container.txt", [6, 6], [0, 1], [12, 13], "Ascend910", 34, 2874, 65536),
        ("310p3_25.2.0.txt", [2, 2], [0, 1], [0, 1], "310P3", 43, 1412, 43693),
        ("310_21.0.3.txt", [1, 1], [0, 1], [0, 1], "310", 49, 2621, 8192),
        ("950pr_25.7.rc1.txt", [0, 1], [None, None], [None] * 2, "Ascend950PR", 57, 5413, 131072),
    ],
)
def test_every_recorded_layout_is_read(
    name: str,
    npus: list[int],
    chips: list[int],
    physical: list[int | None],
    names: str,
    celsius: float,
    used: int,
    total: int,
) -> None:
    found = npu_smi.parse_info(recorded(name))

    last = found.chips[-1]
    assert f"Version: {found.version} " in recorded(name)
    assert [one.npu for one in found.chips] == npus
    assert [one.chip for one in found.chips] == chips
    assert [one.physical for one in found.chips] == physical
    assert {one.name for one in found.chips} == {names}
    assert last.temperature_celsius == celsius
    assert (last.memory_used_bytes, last.memory_total_bytes) == (used * MIB, total * MIB)


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("910a_23.0.rc2.txt", []),
        ("910prob_24.1.0.txt", []),
        ("910b4_26.0.rc1.txt", [(1, 0, 485946, "pytest", 5175)]),
        ("910c_25.2.1.txt", [(1, 0, 1444272, "sglangschedul", 23490)]),
        (
            "950pr_25.7.rc1.txt",
            [(0, None, 1530715, "python", 4724), (0, None, 1655234, "python", 4728)],
        ),
    ],
)
def test_processes_are_read_and_no_process_is_a_chip(
    name: str, processes: list[tuple[int, int | None, int, str, int]]
) -> None:
    found = npu_smi.parse_info(recorded(name)).processes

    assert [
        (one.npu, one.chip, one.pid, one.name, one.memory_bytes // MIB) for one in found
    ] == processes


def test_a_dead_chip_has_no_figures_but_a_row() -> None:
    warned, dead, well = npu_smi.parse_info(recorded("910b2_dead.txt")).chips

    assert (warned.health, dead.health, well.health) == ("Warning", "Critical", "OK")
    assert (dead.memory_total_bytes, dead.temperature_celsius) == (None, None)
    assert well.npu == 2


def test_text_that_is_no_table_has_no_chips() -> None:
    assert npu_smi.parse_info(recorded("no_driver.txt")).chips == ()
    assert npu_smi.parse_info("").chips == ()
    assert npu_smi.parse_info("| NPU |\n| 0 | a |\n|  |\n||\n").chips == ()


def test_the_controller_of_a_card_has_no_logical_number() -> None:
    one_die = npu_smi.parse_mapping(recorded("910b4_map.txt"))
    two_dies = npu_smi.parse_mapping(recorded("910c_map.txt"))

    assert one_die == {(0, 0): 0, (1, 0): 1}
    assert two_dies == {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}


def test_links_are_named_as_mst_names_devices(tmp_path: Path) -> None:
    table = reading("910b3_24.1.rc1.txt", topology="910b3_24.1.rc1_topo.txt")
    environ = machine(tmp_path) | {"ASCEND_RT_VISIBLE_DEVICES": "1,2,3"}
    first, second, _ = ascend.read_probe(tmp_path, environ, table, TORCH_NPU).devices

    assert first.links == {"ascend:1": "HCCS", "ascend:2": "HCCS"}
    assert second.links == {"ascend:0": "HCCS", "ascend:2": "PHB"}


def test_two_dies_of_a_card_are_linked_by_their_own_bus(tmp_path: Path) -> None:
    table = reading(
        "910c_26.0.rc2_container.txt", topology="910c_26.0.rc2_container_topo.txt", board="9392"
    )
    first, second = ascend.read_probe(tmp_path, machine(tmp_path), table, TORCH_NPU).devices

    assert (first.links, second.links) == ({"ascend:1": "SIO"}, {"ascend:0": "SIO"})
    assert (first.arch, first.dtypes) == ("Ascend910_9392", BF16)


@pytest.mark.parametrize(
    ("printed", "board", "soc", "dtypes"),
    [
        ("910A", "", "Ascend910A", NO_BF16),
        ("910B", "", "Ascend910B", NO_BF16),
        ("910ProB", "", "Ascend910ProB", NO_BF16),
        ("910PremiumA", "", "Ascend910PremiumA", NO_BF16),
        ("910B1", "", "Ascend910B1", BF16),
        ("910B2C", "", "Ascend910B2C", BF16),
        ("910B3", "", "Ascend910B3", BF16),
        ("Ascend910B3", "", "Ascend910B3", BF16),
        ("910B4-1", "", "Ascend910B4-1", BF16),
        ("Ascend910", "9362", "Ascend910_9362", BF16),
        ("Ascend910", "", "Ascend910", NO_BF16),
        ("Ascend950PR", "9579", "Ascend950PR_9579", BF16),
        ("310P3", "", "Ascend310P3", NO_BF16),
        ("910B9", "", "Ascend910B9", NO_BF16),
        ("310Pvir02", "", "Ascend310Pvir02", NO_BF16),
    ],
)
def test_bf16_goes_by_the_exact_name(
    printed: str, board: str, soc: str, dtypes: tuple[str, ...]
) -> None:
    name = soc_name(printed, {printed: board} if board else {})

    assert name == soc
    assert dtypes_of(name) == dtypes


def test_the_catalogue_says_the_same_of_bf16() -> None:
    entries = [chip for chip in catalogue.known_chips() if chip.backend == "ascend"]
    names = [(name, chip) for chip in entries for name in chip.names if is_known(name)]

    assert len(names) >= 10
    assert [name for name, chip in names if dtypes_of(name) != chip.dtypes] == []


def test_a_machine_with_everything_is_usable(tmp_path: Path) -> None:
    found = probe(tmp_path)

    device = found.devices[2]
    assert (found.found, found.usable, found.reason) == (True, True, "")
    assert (device.name, device.arch, device.index) == ("Ascend910B3", "Ascend910B3", 2)
    assert device.memory_total_bytes == 65536 * MIB
    assert device.memory_free_bytes == (65536 - 59356) * MIB
    assert (device.uuid, device.driver) == ("npu-2", "25.5.2")
    assert type_fault(found, Probe, "probe") == ""


def test_every_figure_says_where_it_is_from(tmp_path: Path) -> None:
    sources = dict(probe(tmp_path).devices[0].sources)

    assert sources["memory_total_bytes"] == "probe: npu-smi info, HBM-Usage(MB)"
    assert sources["memory_free_bytes"].startswith("probe: npu-smi info, HBM-Usage(MB)")
    assert sources["dtypes"].startswith("table: torch_npu 2.13.0")
    assert sources["peak_tflops"].startswith("unknown: ")


def test_a_910a_has_its_peak_and_no_bf16(tmp_path: Path) -> None:
    device = probe(tmp_path, "910a_23.0.rc2.txt").devices[0]

    assert device.dtypes == NO_BF16
    assert device.peak_tflops == {"float16": 256}
    assert device.sources["peak_tflops"].startswith("table: Huawei")
    # Card 3 is the only one here: CANN counts it as 0.
    assert device.uuid == "npu-0"


def test_a_chip_without_hbm_has_its_own_memory(tmp_path: Path) -> None:
    first, second = probe(tmp_path, "310p3_25.2.0.txt").devices

    assert first.memory_total_bytes == 44280 * MIB
    assert second.sources["memory_total_bytes"] == "probe: npu-smi info, Memory-Usage(MB)"


def test_an_unknown_chip_is_listed_with_the_least(tmp_path: Path) -> None:
    table = reading("310_21.0.3.txt")
    device = ascend.read_probe(tmp_path, machine(tmp_path), table, TORCH_NPU).devices[0]

    assert (device.arch, device.dtypes, device.peak_tflops) == ("Ascend310", NO_BF16, {})
    assert device.sources["dtypes"].startswith("unknown: Ascend310 is not in torch_npu")
    assert "not a chip that mst knows" in problems(device, table)[0]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (None, (0, 1, 2, 3)),
        ("0", (0,)),
        ("1,3", (1, 3)),
        ("1,2,9,3", (1, 2)),
        ("1, 2", (1,)),
        ("2,1", ()),
        ("1,1", ()),
        ("", ()),
        ("none", ()),
        ("-1", ()),
        ("8", ()),
        (",1", ()),
    ],
)
def test_visible_numbers_are_read_as_cann_reads_them(
    text: str | None, numbers: tuple[int, ...]
) -> None:
    assert ascend.visible_numbers(text, 4) == numbers


def test_visible_devices_count_from_zero_and_lead_back(tmp_path: Path) -> None:
    found = probe(tmp_path, variables={"ASCEND_RT_VISIBLE_DEVICES": "1,3"})
    environment = ascend.mst_environment([found.devices[1]])

    assert [one.index for one in found.devices] == [0, 1]
    assert [one.uuid for one in found.devices] == ["npu-1", "npu-3"]
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "3"


def test_hiding_every_chip_is_said(tmp_path: Path) -> None:
    found = probe(tmp_path, variables={"ASCEND_RT_VISIBLE_DEVICES": ""})

    assert (found.found, found.usable, found.devices) == (True, False, ())
    assert found.reason.startswith("ASCEND_RT_VISIBLE_DEVICES='' hides all 4 chips: unset it")


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (
            Extension(False, "", "2.13.0+cpu"),
            "torch_npu is not installed: python -m pip install torch-npu==2.13.0",
        ),
        (
            Extension(True, "2.7.1.post2", "2.13.0+cpu"),
            "torch-npu 2.7.1.post2 is built for another torch than 2.13.0+cpu: "
            "python -m pip install torch-npu==2.13.0",
        ),
        (Extension(False, "", ""), "torch is not installed: python -m pip install torch torch-npu"),
    ],
)
def test_a_missing_or_foreign_torch_npu_is_named(
    tmp_path: Path, extension: Extension, reason: str
) -> None:
    found = probe(tmp_path, extension=extension)

    assert (found.found, found.usable, len(found.devices)) == (True, False, 4)
    assert found.reason == reason


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0.post1", "2.13.1rc2", ""])
def test_a_release_of_the_same_torch_will_do(tmp_path: Path, version: str) -> None:
    assert probe(tmp_path, extension=Extension(True, version, "2.13.0+cu130")).usable


def test_without_cann_in_the_shell_its_script_is_named(tmp_path: Path) -> None:
    machine(tmp_path)
    found = ascend.read_probe(tmp_path, {}, reading("910b3_24.1.rc1.txt"), TORCH_NPU)

    assert (found.found, found.usable) == (True, False)
    assert found.reason == (
        f"CANN is not loaded, ASCEND_HOME_PATH is not set: source {tmp_path / TOOLKIT}/set_env.sh"
    )


def test_loaded_cann_has_a_version_and_nothing_missing(tmp_path: Path) -> None:
    found = find_cann(tmp_path, machine(tmp_path))

    assert (found.version, found.missing) == ("8.5.0", "")


@pytest.mark.parametrize(
    ("variable", "value", "missing"),
    [
        ("ASCEND_HOME_PATH", "/gone", "ASCEND_HOME_PATH names /gone, which is not there"),
        ("ASCEND_OPP_PATH", "", "ASCEND_OPP_PATH is not set"),
        ("ASCEND_HOME_PATH", "/", "/ has no runtime"),
        ("LD_LIBRARY_PATH", "/nowhere", "LD_LIBRARY_PATH has no libhccl.so"),
    ],
)
def test_cann_that_is_half_loaded_is_not_loaded(
    tmp_path: Path, variable: str, value: str, missing: str
) -> None:
    environ = machine(tmp_path) | {variable: value}

    assert find_cann(tmp_path, environ).missing == missing


def test_libraries_that_the_loader_knows_need_no_variable(tmp_path: Path) -> None:
    environ = machine(tmp_path) | {"LD_LIBRARY_PATH": ""}
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.cache").write_bytes(b"\0libhccl.so\0")

    assert find_cann(tmp_path, environ).missing == ""


def test_the_layout_of_cann_8_5_is_found(tmp_path: Path) -> None:
    (tmp_path / "usr/local/Ascend/cann").mkdir(parents=True)
    script = tmp_path / "usr/local/Ascend/cann/set_env.sh"
    script.touch()

    assert find_cann(tmp_path, {}).set_env == str(script)


def test_no_chip_is_not_found(tmp_path: Path) -> None:
    cann = find_cann(tmp_path, {})
    found = ascend.without_chip(cann, Extension(False, "", "2.13.0"))

    assert (found.found, found.usable, found.devices) == (False, False, ())
    assert "no /dev/davinci*" in found.reason
    assert "torch-npu" not in found.reason


def test_torch_npu_without_chip_and_cann_is_to_be_uninstalled(tmp_path: Path) -> None:
    reason = ascend.without_chip(find_cann(tmp_path, {}), TORCH_NPU).reason

    assert reason.endswith(
        "torch-npu 2.13.0 is installed without CANN (ASCEND_HOME_PATH is not set) and breaks"
        " `import torch`: python -m pip uninstall torch-npu"
    )


@pytest.mark.parametrize(
    ("driver", "manager", "words"),
    [
        (True, True, "HwHiAiUser"),
        (False, True, "/usr/local/Ascend/driver is missing"),
        (True, False, "--device /dev/davinci_manager"),
    ],
)
def test_a_driver_that_does_not_answer_is_explained(
    tmp_path: Path, driver: bool, manager: bool, words: str
) -> None:
    environ = machine(tmp_path, nodes=2, driver=driver)
    if not manager:
        (tmp_path / "dev/davinci_manager").unlink()
    silent = Reading(error="npu-smi info: dcmi module initialize failed. ret is -8005")
    found = ascend.read_probe(tmp_path, environ, silent, TORCH_NPU)

    assert (found.found, found.usable, len(found.devices)) == (True, False, 2)
    assert found.devices[1].dtypes == NO_BF16
    assert "ret is -8005" in found.reason
    assert words in found.reason


def test_what_is_wrong_with_a_chip_is_told(tmp_path: Path) -> None:
    table = reading("910b2_dead.txt")
    warned, dead, well = ascend.read_probe(tmp_path, machine(tmp_path), table, TORCH_NPU).devices

    assert ["Warning" in one for one in problems(warned, table)] == [True, False]
    assert problems(warned, table)[1].startswith("93 °C")
    assert "-i 1 -c 0" in problems(dead, table)[0]
    assert problems(well, table) == []


def test_the_power_and_the_heat_of_a_chip_are_those_that_npu_smi_shows(tmp_path: Path) -> None:
    table = reading("910b2_dead.txt")
    warned, dead, _ = ascend.read_probe(tmp_path, machine(tmp_path), table, TORCH_NPU).devices
    hidden = replace(dead, uuid="npu-9")

    assert telemetry(warned, table) == Telemetry(power_watts=101.8, temperature_celsius=93)
    assert telemetry(dead, table) == Telemetry(reason="npu-smi shows no power of this chip")
    assert "does not list" in telemetry(hidden, table).reason
    assert telemetry(warned, Reading(error="npu-smi hangs")).reason == "npu-smi hangs"


def test_a_chip_that_cann_does_not_number_is_left_out_and_named(tmp_path: Path) -> None:
    table = replace(reading("910b2_dead.txt"), logical={(0, 0): 0, (2, 0): 1})
    first, second = ascend.read_probe(tmp_path, machine(tmp_path), table, TORCH_NPU).devices

    assert (first.uuid, second.uuid) == ("npu-0", "npu-1")
    assert problems(first, table)[0].startswith("card 1, chip 0 (910B2, health Critical)")
    assert problems(second, table) == []


def test_other_processes_are_named_with_what_they_hold(tmp_path: Path) -> None:
    table = reading("910b4_26.0.rc1.txt")
    free, busy = ascend.read_probe(tmp_path, machine(tmp_path), table, TORCH_NPU).devices

    assert problems(free, table) == []
    assert problems(busy, table) == [
        "other processes hold memory: pytest (pid 485946) 5.1 GiB; end them, or choose another chip"
    ]


def test_memory_held_from_outside_a_container_is_told(tmp_path: Path) -> None:
    table = reading("910b3_24.1.rc1.txt")
    devices = ascend.read_probe(tmp_path, machine(tmp_path), table, TORCH_NPU).devices

    assert [len(problems(one, table)) for one in devices] == [0, 0, 1, 0]
    assert problems(devices[2], table)[0].startswith("58.0 of 64 GiB are in use")


def test_workers_of_several_chips_wait_for_each_other(tmp_path: Path) -> None:
    devices = probe(tmp_path).devices

    one, two = (ascend.mst_environment(some) for some in (devices[:1], devices[2:0:-1]))

    assert "HCCL_CONNECT_TIMEOUT" not in one
    assert 120 < int(two["HCCL_CONNECT_TIMEOUT"]) <= 7200
    assert two["ASCEND_RT_VISIBLE_DEVICES"] == "1,2"
    assert two["DS_ACCELERATOR"] == "npu"


@pytest.mark.parametrize(
    ("arch", "driver", "expands"),
    [
        ("Ascend910B3", "24.1.rc1", True),
        ("Ascend910B3", "22.0.4", False),
        ("Ascend910B3", "", False),
        ("Ascend310P3", "25.2.0", False),
    ],
)
def test_segments_expand_where_the_driver_can(arch: str, driver: str, expands: bool) -> None:
    device = DeviceFacts("ascend", 0, arch, arch, None, None, NO_BF16, uuid="npu-0", driver=driver)

    assert ("PYTORCH_NPU_ALLOC_CONF" in ascend.mst_environment([device])) is expands


def test_what_is_promised_holds_for_every_dtype(tmp_path: Path) -> None:
    capabilities = ascend.mst_capabilities(probe(tmp_path).devices[0])

    assert (capabilities.torch_device, capabilities.distributed_backend) == ("npu", "hccl")
    assert capabilities.attention == ("sdpa", "eager")
    assert capabilities.quantization == ("none",)
    assert capabilities.visible_devices_env == "ASCEND_RT_VISIBLE_DEVICES"


def fake_npu_smi(folder: Path, body: str) -> str:
    folder.mkdir(exist_ok=True)
    program = folder / "npu-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


def printing(name: str) -> str:
    """Return a program that answers as the 910C recorded in `name` does."""
    return f"""case "$*" in
      info) cat '{RECORDED}/{name}' ;;
      "info -m") cat '{RECORDED}/910c_map.txt' ;;
      "info -t board -i 0 -c 0") cat '{RECORDED}/910c_board.txt' ;;
      *) echo "unknown command"; exit 1 ;;
    esac"""


def test_the_program_is_asked_for_the_exact_name(tmp_path: Path) -> None:
    program = fake_npu_smi(tmp_path / "bin", printing("910c_25.2.1.txt"))

    found = npu_smi.read(program, seconds=10)

    assert found.error == ""
    assert found.boards == {"Ascend910": "9392"}
    assert found.logical[1, 1] == 3
    assert found.topology == {}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sleep 30", "did not answer in 0."),
        (f"cat '{RECORDED}/no_driver.txt'", "ret is -8005"),
        ("echo broken >&2; exit 3", "broken"),
        ("exit 3", "exit code 3"),
        ("echo nothing", "lists no chip (version unknown)"),
    ],
)
def test_a_program_that_fails_says_how(tmp_path: Path, body: str, words: str) -> None:
    program = fake_npu_smi(tmp_path / "bin", body)

    began = time.monotonic()
    found = npu_smi.read(program, seconds=0.5 if "sleep" in body else 10)

    assert words in found.error
    assert time.monotonic() - began < 10


def test_the_hooks_read_a_tree_that_stands_for_the_machine(tmp_path: Path) -> None:
    """As a whole process: what `mst devices` does, without torch."""
    environ = machine(tmp_path / "root", nodes=4)
    fake_npu_smi(tmp_path / "bin", printing("910c_25.2.1.txt"))
    code = (
        "import sys; from mst_backends import ascend; probe = ascend.mst_probe();"
        "print(*(f'{one.uuid}={one.arch}' for one in probe.devices));"
        "print(len(ascend.mst_health(probe.devices[1])), 'torch' in sys.modules)"
    )

    child = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            **environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "MST_ASCEND_ROOT": str(tmp_path / "root"),
            "ASCEND_RT_VISIBLE_DEVICES": "0,2,3",
        },
        capture_output=True,
        text=True,
        check=True,
    )

    assert child.stdout.splitlines() == [
        "npu-0=Ascend910_9392 npu-2=Ascend910_9392 npu-3=Ascend910_9392",
        "1 False",
    ]


def test_this_machine_is_probed_at_once() -> None:
    began = time.monotonic()
    found = ascend.mst_probe()

    assert time.monotonic() - began < 2
    assert found.found or "no /dev/davinci*" in found.reason
