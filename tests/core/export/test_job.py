"""What stands in an export's way is told before any work, on machines of every size."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pluggy
import pytest

from mst import hookspecs, rundir
from mst.errors import MstError, RunError
from mst.export.job import ExportOptions, prepare_export, waiting_asleep
from mst.facts import Probe
from mst.hookspecs import hookimpl
from mst.registry import Registry, load
from mst_backends import cpu

GIB = 2**30


def in_a_container(root: Path, limit: int) -> Registry:
    """Return the plugins of a process whose control group limits its memory, on 64 GiB."""
    files = {
        "proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {60 * GIB // 1024} kB\n",
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": "29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/box/memory.max": f"{limit}\n",
        "sys/fs/cgroup/box/memory.current": "0\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    class Container:
        @hookimpl
        def mst_probe(self) -> Probe:
            return Probe(True, True, (cpu.read_facts(root),))

        mst_capabilities = staticmethod(cpu.mst_capabilities)

    manager = pluggy.PluginManager("mst")
    manager.add_hookspecs(hookspecs)
    manager.register(Container())
    return replace(load(), backends={"cpu": manager.hook})


def test_the_limit_of_a_container_counts_as_memory(finished_run: Path, tmp_path: Path) -> None:
    options = ExportOptions(output_dir=str(tmp_path / "out"))
    # The tiny model twice, in float32, takes 4 MB.
    large = prepare_export(finished_run, options, in_a_container(tmp_path, GIB))

    assert large.targets[0].name == "merged"
    with pytest.raises(MstError, match=r"1.0 MiB are free \(probe: /sys/fs/cgroup/box/memory.max"):
        prepare_export(finished_run, options, in_a_container(tmp_path, 10**6))


def test_a_disk_that_is_too_small_is_told_before(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: space)
    options = ExportOptions(output_dir=str(tmp_path / "out"))

    merge = r"the export with the merge that it is made of takes 49\.5 MiB; .* Free some space, or"
    with pytest.raises(RunError, match=merge):
        prepare_export(finished_run, options, load())
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_still_running_is_refused(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    rundir.update_manifest(run, status="running")

    with (
        rundir.take_lock(run),
        pytest.raises(
            RunError, match=r"no result yet\. Wait until it has ended, or.*--checkpoint last"
        ),
    ):
        prepare_export(run, ExportOptions(), load())


def test_processes_side_by_side_wait_asleep_unless_the_user_says_otherwise() -> None:
    assert waiting_asleep({"A": "1"}) == {"A": "1", "OMP_WAIT_POLICY": "passive"}
    assert waiting_asleep({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active"}
