"""The CPU backend, on recorded machines and on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from mst.facts import DeviceFacts
from mst_backends import cpu

GIB = 2**30
MEMINFO = "MemTotal:       32768000 kB\nMemFree:         1000000 kB\nMemAvailable:   16384000 kB\n"
V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {group} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {group} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
)
V1_UNLIMITED = "9223372036854771712\n"
SAPPHIRE_RAPIDS = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Gold 6430\n"
    "flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8\n\n"
    "processor\t: 1\nmodel name\t: another\nflags\t\t: fpu\n\n"
)
CASCADE_LAKE = (
    "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Gold 6230\n"
    "flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni\n\n"
)
KUNPENG_920 = (
    "processor\t: 0\nBogoMIPS\t: 200.00\n"
    "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp\n"
    "CPU implementer\t: 0x48\nCPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd01\n\n"
)
NEOVERSE_V1 = (
    "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n"
)


def tree(root: Path, files: Mapping[str, str], cpuinfo: str = CASCADE_LAKE) -> Path:
    """Write a machine of 4 cores with 2 threads each, and 15.6 of 31.25 GiB free."""
    siblings = {
        f"sys/devices/system/cpu/cpu{one}/topology/thread_siblings_list": f"{one % 4},{one % 4 + 4}"
        for one in range(8)
    }
    machine = {"proc/cpuinfo": cpuinfo, "proc/meminfo": MEMINFO, **siblings, **files}
    for name, text in machine.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def facts(root: Path, machine: str = "x86_64") -> DeviceFacts:
    return cpu.read_facts(root, affinity=range(8), machine=machine)


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "name", "features", "dtypes"),
    [
        pytest.param(
            SAPPHIRE_RAPIDS,
            "x86_64",
            "Intel(R) Xeon(R) Gold 6430",
            ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
            ("bfloat16", "float32"),
            id="sapphire-rapids",
        ),
        pytest.param(
            CASCADE_LAKE,
            "x86_64",
            "Intel(R) Xeon(R) Gold 6230",
            ("avx2", "avx512f"),
            ("float32", "bfloat16"),
            id="cascade-lake",
        ),
        pytest.param(
            KUNPENG_920,
            "aarch64",
            "TaiShan-v110 (Kunpeng 920)",
            ("asimd",),
            ("float32", "bfloat16"),
            id="kunpeng-920",
        ),
        pytest.param(
            NEOVERSE_V1,
            "aarch64",
            "Neoverse-V1",
            ("asimd", "bf16", "i8mm", "sve"),
            ("bfloat16", "float32"),
            id="neoverse-v1",
        ),
        pytest.param(
            NEOVERSE_V1.replace("0xd40", "0xfff"),
            "aarch64",
            "ARM implementer 0x41 part 0xfff",
            ("asimd", "bf16", "i8mm", "sve"),
            ("bfloat16", "float32"),
            id="unknown-arm",
        ),
    ],
)
def test_name_features_and_dtypes_come_from_cpuinfo(
    tmp_path: Path,
    cpuinfo: str,
    machine: str,
    name: str,
    features: tuple[str, ...],
    dtypes: tuple[str, ...],
) -> None:
    device = facts(tree(tmp_path, {}, cpuinfo), machine)

    assert (device.name, device.arch) == (name, machine)
    assert device.features == features
    assert device.dtypes == dtypes


def test_hyper_threads_count_once(tmp_path: Path) -> None:
    root = tree(tmp_path, {})

    assert facts(root).compute_units == 4
    assert cpu.read_facts(root, affinity={0, 4}, machine="x86_64").compute_units == 1
    assert cpu.read_facts(root, affinity={0, 1, 5}, machine="x86_64").compute_units == 2


def test_without_limits_the_machine_is_ours(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT})

    device = facts(root)

    assert device.memory_total_bytes == 32768000 * 1024
    assert device.memory_free_bytes == 16384000 * 1024
    assert device.sources["memory_free_bytes"] == "probe: /proc/meminfo MemAvailable"
    assert "4 physical cores of 8 logical CPUs" in device.sources["compute_units"]


def test_the_strictest_group_of_version_2_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/slurm/job7/step0\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/slurm/job7/step0/cpu.max": "max 100000\n",
        "sys/fs/cgroup/slurm/job7/step0/memory.max": "max\n",
        "sys/fs/cgroup/slurm/job7/step0/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/slurm/job7/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/slurm/job7/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/slurm/job7/memory.current": f"{6 * GIB}\n",
        "sys/fs/cgroup/slurm/job7/memory.stat": f"anon {4 * GIB}\ninactive_file {2 * GIB}\n",
        "sys/fs/cgroup/slurm/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/slurm/memory.max": f"{12 * GIB}\n",
        # Another job of the same user leaves less than this job's own limit does.
        "sys/fs/cgroup/slurm/memory.current": f"{11 * GIB}\n",
    }

    device = facts(tree(tmp_path, files))

    assert device.compute_units == 2
    assert (
        "/sys/fs/cgroup/slurm/job7/cpu.max, 2.5 CPUs of 4 cores" in device.sources["compute_units"]
    )
    assert device.memory_total_bytes == 8 * GIB
    assert device.memory_free_bytes == 1 * GIB
    assert device.sources["memory_free_bytes"] == "probe: /sys/fs/cgroup/slurm/memory.max"


def test_page_cache_that_can_be_dropped_counts_as_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/box/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/box/memory.current": f"{6 * GIB}\n",
        "sys/fs/cgroup/box/memory.stat": f"file {5 * GIB}\ninactive_file {4 * GIB}\n",
    }

    assert facts(tree(tmp_path, files)).memory_free_bytes == 6 * GIB


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/box/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/box/memory.high": f"{5 * GIB}\n",
    }

    assert facts(tree(tmp_path, files)).memory_total_bytes == 5 * GIB


@pytest.mark.parametrize("own", ["/docker/abc", "/", "/../../elsewhere"])
def test_a_container_reads_its_limits_at_the_mount_point(tmp_path: Path, own: str) -> None:
    """Without a cgroup namespace the path is the host's; with one it may point outside."""
    mounted = "/docker/abc" if own == "/docker/abc" else "/"
    files = {
        "proc/self/cgroup": f"4:memory:{own}\n1:cpu,cpuacct:{own}\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(group=mounted),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    }

    device = facts(tree(tmp_path, files))

    assert device.compute_units == 3
    assert device.memory_total_bytes == 4 * GIB
    assert device.memory_free_bytes == 2 * GIB


def test_version_1_without_limits_and_a_nested_one(tmp_path: Path) -> None:
    """As recorded on a virtual machine whose groups are mounted but not limited."""
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/api/9f\n2:cpu,cpuacct:/\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(group="/"),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
        "sys/fs/cgroup/memory/api/9f/memory.limit_in_bytes": V1_UNLIMITED,
        "sys/fs/cgroup/memory/api/9f/memory.usage_in_bytes": "343412736\n",
    }
    root = tree(tmp_path, files)

    assert facts(root).compute_units == 4
    assert facts(root).memory_total_bytes == 32768000 * 1024

    (root / "sys/fs/cgroup/memory/api/memory.limit_in_bytes").write_text(f"{GIB}\n")

    assert facts(root).memory_total_bytes == GIB


def test_a_quota_below_one_cpu_still_gives_one_thread(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
    }

    assert facts(tree(tmp_path, files)).compute_units == 1


def test_a_quota_above_the_cores_changes_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/cpu.max": "600000 100000\n",
    }

    assert facts(tree(tmp_path, files)).compute_units == 4


def test_a_machine_without_proc_has_unknown_memory(tmp_path: Path) -> None:
    device = facts(tmp_path)

    assert (device.memory_total_bytes, device.memory_free_bytes) == (None, None)
    assert (device.name, device.compute_units) == ("x86_64", 8)


def test_this_machine_is_within_what_psutil_sees() -> None:
    device = cpu.read_facts()

    assert device.memory_total_bytes is not None
    assert 0 < device.memory_total_bytes <= psutil.virtual_memory().total
    assert device.memory_free_bytes is not None
    assert 0 < device.memory_free_bytes <= device.memory_total_bytes
    assert device.compute_units is not None
    assert 1 <= device.compute_units <= len(os.sched_getaffinity(0))


def test_every_number_has_a_source(tmp_path: Path) -> None:
    device = facts(tree(tmp_path, {}))

    assert set(device.sources) == {
        "memory_total_bytes",
        "memory_free_bytes",
        "compute_units",
        "peak_tflops",
    }
    assert device.sources["peak_tflops"].startswith("unknown: ")
    assert all(
        source.startswith("probe: ")
        for name, source in device.sources.items()
        if name != "peak_tflops"
    )


def test_the_environment_governs_the_threads_of_torch() -> None:
    device = DeviceFacts("cpu", 0, "a core", "x86_64", None, None, ("float32",), compute_units=1)
    variables = cpu.mst_environment([device])

    child = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )

    assert child.stdout.strip() == "1"
    assert variables["OPENBLAS_NUM_THREADS"] == "1"


def test_unknown_cores_leave_the_threads_alone() -> None:
    device = DeviceFacts("cpu", 0, "a core", "x86_64", None, None, ("float32",))

    assert not [name for name in cpu.mst_environment([device]) if "THREADS" in name]


def test_freed_tensors_go_back_to_the_system() -> None:
    device = DeviceFacts("cpu", 0, "a core", "x86_64", None, None, ("float32",), compute_units=1)
    code = (
        "import torch; from pathlib import Path;"
        "kept = [torch.ones(2**20) for _ in range(200)];"
        "mark = torch.ones(2**10); del kept;"
        "print(int(Path('/proc/self/statm').read_text().split()[1]) * 4096)"
    )
    residents = [
        int(
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, **variables},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for variables in (
            {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)},
            cpu.mst_environment([device]),
        )
    ]

    # 200 tensors of 4 MiB were freed.
    assert residents[0] - residents[1] > 600 * 2**20


def test_health_tells_of_little_memory_and_old_cores(tmp_path: Path) -> None:
    well = facts(tree(tmp_path / "well", {}))
    files = {"proc/meminfo": MEMINFO.replace("16384000", "1048576")}
    poor = facts(tree(tmp_path / "poor", files, CASCADE_LAKE.replace("avx2", "")))

    assert cpu.mst_health(well) == []
    assert ["AVX2" in problem for problem in cpu.mst_health(poor)] == [True, False]
    assert "1.0 GiB of memory free (probe: /proc/meminfo MemAvailable)" in cpu.mst_health(poor)[1]


def test_probing_needs_no_torch() -> None:
    code = (
        "import sys; from mst_backends import cpu; probe = cpu.mst_probe();"
        "cpu.mst_capabilities(); cpu.mst_health(probe.devices[0]);"
        "print(probe.usable, 'torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert child.stdout.split() == ["True", "False"]
