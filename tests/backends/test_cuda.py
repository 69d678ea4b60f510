"""The CUDA backend, on recorded machines, on a stub of the driver's library, and on this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mst.facts import DeviceFacts, Probe
from mst.probe import type_fault
from mst_backends import cuda, nvidia_smi, nvml
from mst_backends.cuda_health import machine_problems, problems
from mst_backends.cuda_visible import visible
from mst_backends.nvidia_card import Card, Instance, Listing
from mst_backends.torch_build import TorchBuild, parse_version_file

RECORDED = Path(__file__).parents[1] / "data/nvidia"
MIB = 2**20
TORCH = TorchBuild("2.13.0+cu128", "cuda", (12, 8))
Read = Callable[[str], Listing]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Ask the nvidia-smi of a recorded machine, as a program on the PATH."""

    def ask(machine: str) -> Listing:
        monkeypatch.setenv("PATH", f"{put_on_path(tmp_path, machine)}:{os.environ['PATH']}")
        return nvidia_smi.read()

    return ask


def put_on_path(folder: Path, machine: str) -> Path:
    script = folder / "nvidia-smi"
    fake = RECORDED / "fake_nvidia_smi.py"
    script.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -S "{fake}" "{RECORDED / machine}" "$@"\n'
    )
    script.chmod(0o755)
    return folder


def probe(
    listing: Listing, environ: Mapping[str, str] | None = None, torch: TorchBuild = TORCH
) -> Probe:
    return cuda.describe(listing, environ or {}, torch)


def health(listing: Listing, index: int = 0, torch: TorchBuild = TORCH) -> list[str]:
    return problems(probe(listing, torch=torch).devices[index], listing, torch)


def device(name: str, uuid: str = "GPU-1", driver: str = "", arch: str = "sm89") -> DeviceFacts:
    return DeviceFacts("cuda", 0, name, arch, None, None, ("bfloat16",), uuid=uuid, driver=driver)


@pytest.mark.parametrize(
    ("machine", "name", "arch", "total_mib", "free_mib", "dtypes", "features"),
    [
        ("a100_80g_x4", "NVIDIA A100-SXM4-80GB", "sm80", 81302, 81038, "bfloat16", "tf32"),
        ("h100", "NVIDIA H100 80GB HBM3", "sm90", 81028, 8569, "bfloat16", "fp8"),
        ("h200", "NVIDIA H200", "sm90", 143162, 143162, "bfloat16", "fp8"),
        ("rtx3090_x2", "NVIDIA GeForce RTX 3090", "sm86", 24163, 24150, "bfloat16", "tf32"),
        ("rtx4090_wsl", "NVIDIA GeForce RTX 4090", "sm89", 24181, 23210, "bfloat16", "fp8"),
        ("t4", "Tesla T4", "sm75", 14928, 14923, "float16", "tensor_cores"),
        ("v100", "Tesla V100-SXM2-16GB", "sm70", 15995, 15990, "float16", "tensor_cores"),
        ("future", "NVIDIA Z500 512GB", "sm150", 523388, 520000, "bfloat16", "fp4"),
    ],
)
def test_a_recorded_card_is_described(
    read: Read,
    machine: str,
    name: str,
    arch: str,
    total_mib: int,
    free_mib: int,
    dtypes: str,
    features: str,
) -> None:
    answer = probe(read(machine))
    first = answer.devices[0]

    assert (answer.found, answer.usable, answer.reason) == (True, True, "")
    assert (first.name, first.arch, first.index) == (name, arch, 0)
    assert first.memory_total_bytes == total_mib * MIB
    assert first.memory_free_bytes == free_mib * MIB
    assert (first.dtypes[0], first.dtypes[-2:]) == (dtypes, ("float16", "float32"))
    assert first.features[-1] == features
    assert first.uuid.startswith("GPU-")


@pytest.mark.parametrize("machine", ["a100_80g_x4", "a100_80g_mig", "gb10", "driver_390", "t4"])
def test_facts_are_of_the_declared_types_and_every_figure_has_a_source(
    read: Read, machine: str
) -> None:
    answer = probe(read(machine))
    known = [
        (one, name)
        for one in answer.devices
        for name in ("memory_total_bytes", "memory_free_bytes", "compute_units", "peak_tflops")
        if getattr(one, name)
    ]

    assert type_fault(answer, Probe, "mst_probe's answer") == ""
    assert all(name in one.sources for one, name in known)


def test_nvlink_and_pcie_are_told_apart(read: Read) -> None:
    a100, rtx = probe(read("a100_80g_x4")).devices, probe(read("rtx3090_x2")).devices

    assert len(a100) == 4
    assert a100[1].links == {"cuda:0": "NV12", "cuda:2": "NV12", "cuda:3": "NV12"}
    assert rtx[0].links == {"cuda:1": "SYS"}


def test_links_follow_the_visible_devices(read: Read) -> None:
    answer = probe(read("mixed_3090_1080"), {"CUDA_VISIBLE_DEVICES": "1,0"})

    assert [one.name for one in answer.devices] == [
        "NVIDIA GeForce GTX 1080",
        "NVIDIA GeForce RTX 3090",
    ]
    assert answer.devices[0].links == {"cuda:1": "PHB"}
    assert probe(read("mixed_3090_1080"), {"CUDA_VISIBLE_DEVICES": "1"}).devices[0].links == {}


def test_an_underlined_heading_is_still_a_heading() -> None:
    text = "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV4\t0-7\nGPU1\tNV4\t X \t0-7\n"

    assert nvidia_smi.parse_topology(text) == {0: {1: "NV4"}, 1: {0: "NV4"}}


def test_pascal_computes_in_float32_only(read: Read) -> None:
    old = probe(read("mixed_3090_1080")).devices[1]

    assert (old.arch, old.dtypes, old.features) == ("sm61", ("float32",), ())


def test_figures_come_from_the_catalogue_by_exact_name(read: Read) -> None:
    first = probe(read("a100_80g_x4")).devices[0]
    unknown = probe(read("future")).devices[0]

    assert first.peak_tflops["bfloat16"] == 312
    assert first.sources["peak_tflops"].startswith("table: NVIDIA A100")
    assert first.bandwidth_bytes_per_second == 2039e9
    assert first.sources["bandwidth_bytes_per_second"].startswith("table: ")
    assert first.sources["memory_total_bytes"].startswith("probe: nvidia-smi")
    assert (unknown.peak_tflops, unknown.bandwidth_bytes_per_second) == ({}, None)
    assert "'NVIDIA Z500 512GB' is not in the catalogue" in unknown.sources["peak_tflops"]


def test_mig_instances_are_the_devices(read: Read) -> None:
    answer = probe(read("a100_80g_mig"))

    assert answer.usable
    assert [one.name for one in answer.devices] == ["NVIDIA A100 80GB PCIe MIG 3g.40gb"] * 2
    assert answer.devices[1].uuid == "MIG-3adbed3a-d03d-549f-a016-ba1fd7359f23"
    assert answer.devices[1].memory_total_bytes == 40192 * MIB
    assert answer.devices[1].memory_free_bytes == 20110 * MIB
    assert answer.devices[1].compute_units == 42
    assert answer.devices[1].peak_tflops == {}
    assert "MIG" in answer.devices[1].sources["peak_tflops"]
    assert cuda.mst_capabilities(answer.devices[0]).strategies == ("single",)


def test_mig_mode_without_instances_says_how_to_make_one(read: Read) -> None:
    answer = probe(read("a100_mig_empty"))

    assert (answer.found, answer.usable) == (True, False)
    assert "nvidia-smi mig -cgi" in answer.reason
    assert len(answer.devices) == 1
    assert "mig -cgi" in probe(read("a100_mig_empty"), {"CUDA_VISIBLE_DEVICES": "0"}).reason


def test_one_empty_mig_card_among_others_is_a_matter_of_health() -> None:
    empty = Card(0, "GPU-0", "A100", "0000:01:00.0", (8, 0), mig=True)
    listing = Listing("NVML", (empty, Card(1, "GPU-1", "A100", "0000:02:00.0", (8, 0))), "535.1")

    assert probe(listing).usable
    assert [one.uuid for one in probe(listing).devices] == ["GPU-1"]
    assert "GPU 0 is in MIG mode without instances" in machine_problems(listing, "")[0]


def test_the_fields_an_old_driver_lacks_are_left_out(read: Read) -> None:
    a100, gtx = read("driver_470"), read("driver_390")

    assert a100.cards[0].memory_total_bytes == 81251 * MIB
    assert a100.cards[0].capability is None
    assert not a100.cards[0].mig
    assert (gtx.driver, gtx.cards[0].name) == ("390.48", "GeForce GTX 1080 Ti")
    # compute_cap came with driver 510; the catalogue knows this card by its name.
    assert probe(a100).devices[0].arch == "sm80"
    assert (probe(gtx).devices[0].arch, probe(gtx).devices[0].dtypes) == ("", ("float32",))


def test_fields_that_hold_no_number_are_unknown(read: Read) -> None:
    listing = read("gb10")
    only = probe(listing).devices[0]

    assert (only.memory_total_bytes, only.memory_free_bytes) == (None, None)
    assert (only.arch, listing.cards[0].margin_celsius) == ("sm121", None)
    assert health(listing) == []
    assert health(read("rtx4090_wsl")) == []


def test_a_driver_too_old_for_torch_is_named_with_what_it_takes(read: Read) -> None:
    answer = probe(read("driver_470"))
    newest = probe(read("h100"), torch=TorchBuild("2.13.0+cu130", "cuda", (13, 0)))

    assert (answer.found, answer.usable, len(answer.devices)) == (True, False, 1)
    assert "driver 470.103.01 is too old for torch 2.13.0+cu128" in answer.reason
    assert "525.60.13" in answer.reason
    assert "580" in newest.reason
    assert probe(read("driver_470"), torch=TorchBuild("2.0", "cuda", (11, 8))).usable
    assert probe(replace(read("h100"), driver="1010.10")).usable


def test_a_compatibility_package_makes_an_old_driver_do() -> None:
    cards = (Card(0, "GPU-0", "A100", capability=(8, 0)),)

    assert probe(Listing("NVML", cards, "470.103.01", cuda=(12, 2))).usable
    assert not probe(Listing("NVML", cards, "470.103.01", cuda=(11, 4))).usable


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        (TorchBuild("2.13.0+cpu", "cpu"), "torch 2.13.0+cpu has no CUDA: install the CUDA build"),
        (TorchBuild("2.13.0+rocm6.4", "rocm"), "built for ROCm"),
        (TorchBuild(""), "torch is not installed"),
    ],
)
def test_a_torch_without_cuda_is_the_reason(read: Read, torch: TorchBuild, words: str) -> None:
    answer = probe(read("h100"), torch=torch)

    assert (answer.found, answer.usable, len(answer.devices)) == (True, False, 1)
    assert words in answer.reason


def test_cuda_13_has_no_kernels_for_volta(read: Read) -> None:
    torch = TorchBuild("2.13.0+cu130", "cuda", (13, 0))
    mixed = read("mixed_3090_1080")

    assert "no kernels for sm70" in probe(read("v100"), torch=torch).reason
    assert health(read("v100"), 0, torch) == []
    assert probe(mixed, {"CUDA_VISIBLE_DEVICES": "1,0"}, torch).usable
    assert health(mixed, 0, torch) == []
    assert "no kernels for sm61" in health(mixed, 1, torch)[1]


def test_cuda_12_6_has_no_kernels_for_blackwell(read: Read) -> None:
    answer = probe(read("gb10"), torch=TorchBuild("2.7.0+cu126", "cuda", (12, 6)))

    assert "no kernels for sm121" in answer.reason


@pytest.mark.parametrize(
    ("text", "build"),
    [
        (
            "from typing import Optional\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n"
            "hip: Optional[str] = None\n",
            TorchBuild("2.13.0+cpu", "cpu"),
        ),
        (
            "__version__ = '2.13.0+cu126'\ndebug = False\ncuda: Optional[str] = '12.6'\n",
            TorchBuild("2.13.0+cu126", "cuda", (12, 6)),
        ),
        (
            "__version__ = '2.9.1+rocm6.4'\ncuda: str | None = None\nhip: str | None = '6.4.4'\n",
            TorchBuild("2.9.1+rocm6.4", "rocm"),
        ),
        ("cuda = '11.8'\n__version__ = \"2.0\"\n", TorchBuild("2.0", "cuda", (11, 8))),
        ("", TorchBuild("of unknown version")),
    ],
)
def test_the_version_file_tells_what_torch_is_built_for(text: str, build: TorchBuild) -> None:
    assert parse_version_file(text) == build


CARDS = (
    Card(0, "GPU-aaaa1111", "A100", "0000:01:00.0"),
    Card(1, "GPU-aaaa2222", "A100", "0000:02:00.0"),
    Card(2, "GPU-bbbb3333", "A100", "0000:03:00.0", mig=True,
         instances=(Instance("MIG-c1", "3g.40gb"), Instance("MIG-c2", "3g.40gb"))),
)  # fmt: skip


@pytest.mark.parametrize(
    ("value", "uuids"),
    [
        (None, "GPU-aaaa1111 GPU-aaaa2222 MIG-c1 MIG-c2"),
        ("1,0", "GPU-aaaa2222 GPU-aaaa1111"),
        (" 1 , 0 ", "GPU-aaaa2222 GPU-aaaa1111"),
        ("1,7,0", "GPU-aaaa2222"),
        ("0,-1,1", "GPU-aaaa1111"),
        ("1gpu", "GPU-aaaa2222"),
        ("2", "MIG-c1"),
        ("GPU-bbbb", "MIG-c1"),
        ("GPU-aaaa2222,GPU-aaaa1", "GPU-aaaa2222 GPU-aaaa1111"),
        ("gpu-aaaa2222", ""),
        ("GPU-AAAA2222", "GPU-aaaa2222"),
        ("GPU-aaaa", ""),
        ("MIG-c2,MIG-c1", "MIG-c2 MIG-c1"),
        ("0,0", ""),
        ("0,GPU-aaaa1", ""),
        ("", ""),
        ("-1", ""),
        ("7", ""),
        ("NoDevFiles", ""),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(value: str | None, uuids: str) -> None:
    shown = visible(CARDS, value)

    assert [(unit.instance or unit.card).uuid for unit in shown.units] == uuids.split()
    assert bool(shown.hidden) == (not uuids)


@pytest.mark.parametrize("value", ["", "-1", "9"])
def test_a_hidden_card_is_found_and_the_variable_named(read: Read, value: str) -> None:
    answer = probe(read("h100"), {"CUDA_VISIBLE_DEVICES": value})

    assert (answer.found, answer.usable) == (True, False)
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU" in answer.reason
    assert "unset it, or name a line of `nvidia-smi -L`, such as GPU-2b1f7c60" in answer.reason


def test_numbers_are_ambiguous_where_cards_differ(read: Read) -> None:
    mixed, same = read("mixed_3090_1080").cards, read("rtx3090_x2").cards

    assert "set that too, or use UUIDs" in visible(mixed, "1").note
    assert visible(mixed, "1", "PCI_BUS_ID").note == ""
    assert visible(mixed, "GPU-4b7e").note == ""
    assert visible(mixed, None).note == ""
    assert visible(same, "1").note == ""
    assert "ignores '5'" in visible(same, "1,5").note


def test_health_tells_of_memory_errors_heat_and_other_processes(read: Read) -> None:
    t4, future, h100 = health(read("t4")), health(read("future")), health(read("h100"))
    gtx = health(read("mixed_3090_1080"), 1)

    assert "2 uncorrectable memory errors" in t4[0]
    assert "waits to be taken out of use" in t4[1]
    # A power cap (0x4) is the user's own setting.
    assert len(t4) == 2
    assert "no spares are left" in future[0]
    assert "power brake" in future[1]
    assert h100 == ["other processes hold 70.8 of 79.1 GiB of its memory: see `nvidia-smi`"]
    assert gtx == [
        "slowed at this moment (thermal slowdown by the driver, thermal slowdown by the hardware): "
        "check cooling and power"
    ]
    assert health(read("a100_80g_x4")) == []
    assert health(read("rtx3090_x2"), 1) == []


def test_a_card_that_fell_off_the_bus_is_reported_beside_the_others(read: Read) -> None:
    listing, none = read("one_lost"), read("all_lost")

    assert probe(listing).usable
    assert len(probe(listing).devices) == 1
    assert "GPU is lost" in machine_problems(listing, "")[0]
    assert "reboot" in cuda.describe(none, {}, TORCH, "/dev/nvidia0").reason


@pytest.mark.parametrize(
    ("machine", "words", "advice"),
    [
        ("no_devices", "No devices were found", "dmesg"),
        ("no_driver", "couldn't communicate with the NVIDIA driver", "modprobe nvidia"),
        ("version_mismatch", "Driver/library version mismatch", "reboot"),
    ],
)
def test_a_driver_that_fails_is_quoted_with_what_to_do(
    read: Read, machine: str, words: str, advice: str
) -> None:
    listing = read(machine)
    broken = cuda.describe(listing, {}, TORCH, "/dev/nvidia0")
    absent = cuda.describe(listing, {}, TORCH)

    assert (broken.found, broken.usable, broken.devices) == (True, False, ())
    assert words in broken.reason
    assert advice in broken.reason
    assert (absent.found, absent.usable) == (False, False)
    assert words in absent.reason


def test_a_tool_that_hangs_is_given_up(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi, "SECONDS", 0.3)
    start = time.monotonic()
    listing = read("hanging")

    assert time.monotonic() - start < 2
    assert listing.failure == "nvidia-smi did not answer in 0.3 s"
    assert "dmesg" in cuda.describe(listing, {}, TORCH, "/dev/nvidia0").reason


def test_text_that_is_no_table_is_an_error_message() -> None:
    assert nvidia_smi.parse_cards("").failure == "nvidia-smi printed nothing"
    assert nvidia_smi.parse_cards('a "quoted, word\n').failure == 'a "quoted, word'
    assert nvidia_smi.parse_instance_figures("<nvidia_smi_log><gpu>") == {}
    assert nvidia_smi.parse_topology("ERROR: not supported") == {}


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "seen"),
    [
        ({"dev/nvidia0": "", "dev/nvidiactl": ""}, "/dev/nvidia0"),
        ({"dev/nvidiactl": "", "dev/nvidia-uvm": ""}, ""),
        ({"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""}, "/dev/dxg"),
        # The card of another vendor in Windows.
        ({"dev/dxg": ""}, ""),
        (
            {
                "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
                "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
            },
            "PCI 0000:01:00.0 (kernel driver: none)",
        ),
        # The sound device of such a card, and a card of another vendor.
        (
            {
                "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
                "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
                "sys/bus/pci/devices/0000:02:00.0/vendor": "0x1002\n",
                "sys/bus/pci/devices/0000:02:00.0/class": "0x030000\n",
            },
            "",
        ),
        ({}, ""),
    ],
)
def test_a_card_without_its_driver_is_seen(
    tmp_path: Path, files: Mapping[str, str], seen: str
) -> None:
    found = cuda.hardware(write(tmp_path, files))

    assert seen in found
    assert bool(found) == bool(seen)


def test_capabilities_follow_the_compute_capability_and_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = cuda.mst_capabilities(device("RTX 4090"))
    packages = ("flash_attn", "bitsandbytes", "liger_kernel", "triton")
    write(tmp_path, {f"{each}/__init__.py": "" for each in packages})
    monkeypatch.syspath_prepend(tmp_path)
    ada, turing = cuda.mst_capabilities(device("4090")), device("T4", arch="sm75")
    pascal, unknown = device("GTX 1080", arch="sm61"), device("?", arch="")

    assert (bare.torch_device, bare.distributed_backend) == ("cuda", "nccl")
    assert bare.strategies == ("single", "ddp", "zero1", "zero2", "zero3")
    assert bare.visible_devices_env == "CUDA_VISIBLE_DEVICES"
    assert ada.attention == ("flash_attention_2", "sdpa", "eager")
    assert ada.quantization == ("none", "nf4", "int8")
    assert (bare.liger, ada.liger, cuda.mst_capabilities(turing).liger) == (False, True, False)
    assert cuda.mst_capabilities(turing).attention == ("sdpa", "eager")
    assert cuda.mst_capabilities(turing).quantization == ("none", "nf4", "int8")
    assert cuda.mst_capabilities(pascal).quantization == ("none", "nf4")
    assert cuda.mst_capabilities(unknown).quantization == ("none",)


def test_a_worker_sees_its_cards_by_uuid() -> None:
    chosen = [device("A100", "GPU-7"), device("A100", "GPU-3")]
    variables = cuda.worker_environment(chosen, {"CUDA_VISIBLE_DEVICES": "0,1"})

    assert variables == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-7,GPU-3",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


def test_the_users_own_settings_are_kept() -> None:
    one = [device("A100")]
    user = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}

    assert set(cuda.worker_environment(one, user)) == {"CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"}
    assert "PYTORCH_ALLOC_CONF" not in cuda.worker_environment(one, {"PYTORCH_ALLOC_CONF": ""})
    assert "PYTORCH_ALLOC_CONF" not in cuda.worker_environment(one, {}, wsl=True)


@pytest.mark.parametrize(
    ("name", "driver", "count", "off"),
    [
        ("NVIDIA GeForce RTX 4090", "535.129.03", 2, True),
        ("NVIDIA GeForce RTX 4090", "535.129.03", 1, False),
        ("NVIDIA GeForce RTX 4090", "550.40.07", 2, False),
        ("Quadro RTX 4000", "535.129.03", 2, False),
        ("NVIDIA GeForce RTX 3090", "535.129.03", 2, False),
    ],
)
def test_peer_copies_are_off_where_the_driver_offers_them_in_error(
    name: str, driver: str, count: int, off: bool
) -> None:
    variables = cuda.worker_environment([device(name, driver=driver)] * count, {})

    assert ("NCCL_P2P_DISABLE" in variables) == off
    assert ("NCCL_IB_DISABLE" in variables) == off


ASK = """
import json, sys, time
from dataclasses import asdict
if {block!r}:
    sys.modules["pynvml"] = None
start = time.monotonic()
from mst_backends import cuda
probe = cuda.mst_probe()
seconds = time.monotonic() - start
health = [cuda.mst_health(one) for one in probe.devices]
telemetry = [asdict(cuda.mst_telemetry(one)) for one in probe.devices]
abilities = [asdict(cuda.mst_capabilities(one)) for one in probe.devices]
variables = cuda.mst_environment(probe.devices) if probe.devices else {{}}
print(json.dumps(dict(asdict(probe), health=health, abilities=abilities, seconds=seconds,
    telemetry=telemetry, variables=dict(variables), torch="torch" in sys.modules)))
"""


def ask(folder: Path, environ: Mapping[str, str], block: bool = False) -> dict[str, Any]:
    """Run the real hooks in a process of their own, beside a torch that must not be imported."""
    version = "__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\n"
    write(folder, {"torch/__init__.py": "raise ImportError", "torch/version.py": version})
    sources = [str(folder), *(part for part in sys.path if part)]
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(block=block)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sources), **environ},
        # Whoever types ahead must not feed nvidia-smi.
        input="typed ahead",
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_hooks_work_through_nvidia_smi_alone(tmp_path: Path) -> None:
    path = f"{put_on_path(tmp_path, 'rtx3090_x2')}:{os.environ['PATH']}"
    answer = ask(tmp_path, {"PATH": path, "CUDA_VISIBLE_DEVICES": "1"}, block=True)

    assert (answer["found"], answer["usable"], answer["torch"]) == (True, True, False)
    assert answer["variables"]["CUDA_VISIBLE_DEVICES"].startswith("GPU-1e8d5a60")
    assert answer["health"] == [[]]
    assert answer["seconds"] < 2


def test_a_machine_without_cards_says_where_it_looked(tmp_path: Path) -> None:
    if cuda.hardware():
        pytest.skip("wants a machine without an NVIDIA card")
    answer = ask(tmp_path, {"PATH": str(tmp_path)})

    assert (answer["found"], answer["usable"], answer["devices"]) == (False, False, [])
    assert "no /dev/nvidia*" in answer["reason"]
    assert "nvidia-smi is not found" in answer["reason"]
    assert answer["seconds"] < 2


def test_the_tool_that_failed_is_quoted_and_no_other(tmp_path: Path) -> None:
    path = f"{put_on_path(tmp_path, 'no_driver')}:{os.environ['PATH']}"
    answer = ask(tmp_path, {"PATH": path}, block=True)

    assert "couldn't communicate with the NVIDIA driver" in answer["reason"]
    assert "libnvidia-ml" not in answer["reason"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libnvidia-ml.so.1 that is a stub."""
    if shutil.which("gcc") is None:
        pytest.skip("wants gcc, to build the stub of libnvidia-ml.so.1")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("stub_nvml.c")
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", str(source)]
    subprocess.run([*command, "-o", str(folder / "libnvidia-ml.so.1")], check=True)
    return folder


def through_nvml(tmp_path: Path, library: Path, machine: str) -> dict[str, Any]:
    pytest.importorskip("pynvml", reason="wants the package nvidia-ml-py")
    # Without nvidia-smi, so that nothing but the library can have answered.
    environ = {"LD_LIBRARY_PATH": str(library), "STUB_NVML": machine, "PATH": str(tmp_path)}
    return ask(tmp_path, environ)


def column(answer: Mapping[str, Any], name: str) -> list[Any]:
    return [one[name] for one in answer["devices"]]


def test_nvml_lists_the_cards_in_the_order_of_their_buses(tmp_path: Path, library: Path) -> None:
    answer = through_nvml(tmp_path, library, "a100x2")

    assert (answer["usable"], answer["torch"]) == (True, False)
    assert column(answer, "name") == ["NVIDIA A100-SXM4-80GB"] * 2
    assert [uuid[-1] for uuid in column(answer, "uuid")] == ["2", "1"]
    assert column(answer, "memory_total_bytes") == [(81920 - 618) * MIB] * 2
    assert column(answer, "memory_free_bytes") == [81038 * MIB] * 2
    assert column(answer, "compute_units") == [108, 108]
    assert column(answer, "driver") == ["535.129.03"] * 2
    assert column(answer, "links") == [{"cuda:1": "NV12"}, {"cuda:0": "NV12"}]
    assert answer["seconds"] < 2


def test_nvml_tells_of_errors_brakes_and_heat(tmp_path: Path, library: Path) -> None:
    errors, heat = through_nvml(tmp_path, library, "a100x2")["health"]

    assert "3 uncorrectable memory errors" in errors[0]
    assert "waits to be taken out of use" in errors[1]
    assert errors[2].startswith("slowed at this moment (power brake)")
    assert heat == ["3 °C below its thermal slowdown: check cooling"]


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        ("a100x2", (3.0, 70.002, 40, ["power brake"], "")),
        ("t4x2", (None, 70.001, 86, [], "")),
        ("a6000x2", (None, None, 86, [], "NVML gives neither energy nor power of this card")),
        ("mig", (None, None, None, [], "NVML counts the energy of a whole card, not of a MIG")),
    ],
)
def test_nvml_counts_joules_or_watts_or_says_why_not(
    tmp_path: Path, library: Path, machine: str, told: tuple[object, ...]
) -> None:
    found = through_nvml(tmp_path, library, machine)["telemetry"][0]
    names = ("energy_joules", "power_watts", "temperature_celsius", "throttled")

    assert tuple(found[name] for name in names) == told[:-1]
    assert found["reason"].startswith(str(told[-1]))
    assert bool(found["reason"]) == bool(told[-1])


def test_without_the_library_there_is_no_energy(tmp_path: Path) -> None:
    assert nvml.telemetry("GPU-1").reason.startswith("NVML: ")


def test_nvml_counts_the_links_of_a_bridge(tmp_path: Path, library: Path) -> None:
    answer = through_nvml(tmp_path, library, "a6000x2")

    assert column(answer, "links") == [{"cuda:1": "NV4"}, {"cuda:0": "NV4"}]
    assert column(answer, "compute_units") == [84, 84]


def test_nvml_of_an_old_driver_answers_less(tmp_path: Path, library: Path) -> None:
    answer = through_nvml(tmp_path, library, "t4x2")

    assert column(answer, "links") == [{"cuda:1": "PHB"}, {"cuda:0": "PHB"}]
    assert column(answer, "memory_total_bytes") == [15360 * MIB] * 2
    assert column(answer, "compute_units") == [40, 40]


def test_nvml_lists_mig_instances(tmp_path: Path, library: Path) -> None:
    answer = through_nvml(tmp_path, library, "mig")

    assert column(answer, "name") == ["NVIDIA A100-SXM4-80GB MIG 3g.40gb"] * 2
    assert [uuid[:4] for uuid in column(answer, "uuid")] == ["MIG-", "MIG-"]
    assert column(answer, "memory_total_bytes") == [40192 * MIB] * 2
    assert column(answer, "compute_units") == [42, 42]
    assert answer["abilities"][0]["strategies"] == ["single"]


def test_nvml_goes_on_without_a_lost_card(tmp_path: Path, library: Path) -> None:
    answer = through_nvml(tmp_path, library, "lost")

    assert (answer["usable"], len(column(answer, "name"))) == (True, 1)
    assert answer["health"][0][-1] == "NVML says: GPU 1: GPU is lost"


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ("mismatch", "version mismatch"),
        ("not_loaded", "Driver Not Loaded"),
        ("empty", "No devices"),
    ],
)
def test_nvml_that_fails_is_quoted(tmp_path: Path, library: Path, machine: str, words: str) -> None:
    answer = through_nvml(tmp_path, library, machine)

    assert (answer["usable"], answer["devices"]) == (False, [])
    assert words in answer["reason"]


def test_nvml_that_fails_leaves_the_word_to_nvidia_smi(tmp_path: Path, library: Path) -> None:
    path = f"{put_on_path(tmp_path, 'h200')}:{os.environ['PATH']}"
    environ = {"LD_LIBRARY_PATH": str(library), "STUB_NVML": "mismatch", "PATH": path}

    assert column(ask(tmp_path, environ), "name") == ["NVIDIA H200"]
