"""Which wheels run where, and which torch is for which device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.tags import platform_tags as own_platform_tags

from mst.bundle.pip import Pip, configured_places
from mst.bundle.target import Target, needed_target, platform_tags, target_of
from mst.bundle.wheels import Wheel, _check_torch, check_whole, torch_build
from mst.errors import BundleError

X86 = Target("cpu", "3.11", "x86_64", "2.28")
ARM = Target("cpu", "3.11", "aarch64", "2.28")
NVIDIA = 'nvidia-cublas==13.0; platform_system == "Linux" and platform_machine == "x86_64"'


def test_the_tags_of_this_machine_are_those_that_packaging_says() -> None:
    here = [each for each in own_platform_tags() if "manylinux" in each]
    glibc = here[0].split("_")[2]
    made = platform_tags(
        target_of("cpu", "3.11", f"manylinux_2_{glibc}_{here[0].split(glibc + '_')[1]}")
    )

    assert set(made[:-1]) == set(here)
    assert made[-1].startswith("linux_")


def test_a_wheel_for_older_systems_is_preferred_and_what_is_needed_is_told() -> None:
    newer = Target("cpu", "3.11", "x86_64", "2.34")
    tags = platform_tags(newer)
    files = [
        "a-1-py3-none-any.whl",
        "b-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    ]
    needs_more = "c-1-cp39-abi3-manylinux_2_31_x86_64.whl"

    assert tags.index("manylinux_2_28_x86_64") == 0
    assert tags.index("manylinux_2_5_x86_64") < tags.index("manylinux_2_29_x86_64")
    assert tags[-2:] == ("manylinux_2_34_x86_64", "linux_x86_64")
    assert needed_target(newer, files).glibc == "2.17"
    assert needed_target(newer, [*files, needs_more]).glibc == "2.31"


@pytest.mark.parametrize(
    ("torch", "target", "build"),
    [
        (Wheel("torch", "2.13.0+cpu"), X86, "cpu"),
        (Wheel("torch", "2.13.0+cu130"), X86, "cuda"),
        (Wheel("torch", "2.13.0", (NVIDIA,)), X86, "cuda"),
        (Wheel("torch", "2.13.0", (NVIDIA,)), ARM, "cpu"),
        (Wheel("torch", "2.13.0+rocm7.0"), X86, "rocm7"),
    ],
)
def test_what_torch_is_built_for_is_told_from_its_metadata(
    torch: Wheel, target: Target, build: str
) -> None:
    assert torch_build(torch, target) == build


@pytest.mark.parametrize(
    ("device", "wheels", "said"),
    [
        ("cpu", [Wheel("torch", "2.13.0", (NVIDIA,))], "needs torch built for cpu"),
        ("cuda", [Wheel("torch", "2.13.0+cpu")], "needs torch built for cuda"),
        ("ascend", [Wheel("torch", "2.13.0+cu130")], "needs torch built for cpu"),
        (
            "ascend",
            [Wheel("torch", "2.13.0+cpu"), Wheel("torch-npu", "2.12.0")],
            "torch-npu 2.12.0 is for torch of the same release",
        ),
    ],
)
def test_a_torch_for_another_device_is_refused_before_it_is_downloaded(
    device: str, wheels: list[Wheel], said: str
) -> None:
    with pytest.raises(BundleError, match=said):
        _check_torch(wheels, Target(device, "3.11", "x86_64", "2.28"), Pip(None, None, {}))
    fits = [Wheel("torch", "2.13.0+cpu"), Wheel("torch-npu", "2.13.0.post1")]
    _check_torch(fits, Target("ascend", "3.11", "x86_64", "2.28"), Pip(None, None, {}))


def test_what_the_target_needs_and_lacks_is_named() -> None:
    needs = Wheel("mst-train", "0.1.0", ("a[b]>=2", 'c; python_version < "3.11"'))
    a = Wheel("a", "2.1", ('d; extra == "b"', 'e; extra == "f"'))
    d = Wheel("d", "1")

    check_whole([needs, a, d], X86, ())
    with pytest.raises(BundleError, match=r"a needs d; extra == \"b\" on Python 3.11"):
        check_whole([needs, a], X86, ())
    with pytest.raises(BundleError, match=r"mst-train needs a\[b\]>=2 .*1.9 is there"):
        check_whole([needs, Wheel("a", "1.9"), d], X86, ())
    with pytest.raises(BundleError, match="mst-train needs c"):
        check_whole([needs, a, d], Target("cpu", "3.10", "x86_64", "2.28"), ())


def test_the_places_of_pip_are_told_without_their_passwords(tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://user:secret@pip.example.org/simple\n"
        "[install]\nfind-links = /srv/wheels\n",
        encoding="utf-8",
    )
    environ = {"PIP_CONFIG_FILE": str(config), "HTTPS_PROXY": "http://u:secret@proxy.example:3128"}
    nothing = {"PIP_CONFIG_FILE": "/dev/null"}

    # The machine's own settings may name more.
    told = configured_places(environ)
    assert {"pip.example.org", "/srv/wheels", "proxy.example"} <= set(told)
    assert "secret" not in repr(told)
    assert configured_places(nothing) == ("pip's default index",)


def test_pips_own_markers_are_this_machines_without_ours(tmp_path: Path) -> None:
    """The reason for `mst.bundle.target_pip`: it can go when this fails."""
    (tmp_path / "r.txt").write_text("nothing-of-that-name; python_version < '3.11'\n")
    command = [sys.executable, "-I", "-m", "pip", "download", "--no-index", "--dest", str(tmp_path)]
    command += ["--only-binary=:all:", "--python-version", "3.10", "-r", str(tmp_path / "r.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    if sys.version_info >= (3, 11):
        assert (done.returncode, "Ignoring nothing-of-that-name" in done.stdout) == (0, True)
