"""Hardware that one doesn't own, by the names that people type."""

from __future__ import annotations

import pytest

from mst.errors import UsageError
from mst.hardware import read_hardware
from mst.registry import Registry, load

GIB = 2**30


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load()


@pytest.mark.parametrize(
    ("text", "name", "count", "gib"),
    [
        ("a100-80gb:4", "NVIDIA A100-SXM4-80GB", 4, 80),
        ("A100-40G", "NVIDIA A100-SXM4-40GB", 1, 40),
        ("a100-pcie-80gb", "NVIDIA A100 80GB PCIe", 1, 80),
        ("rtx-3090:2", "NVIDIA GeForce RTX 3090", 2, 24),
        ("rtx3090", "NVIDIA GeForce RTX 3090", 1, 24),
        ("3090", "NVIDIA GeForce RTX 3090", 1, 24),
        ("h200", "NVIDIA H200", 1, 140.4),
        ("910a:8", "910A", 8, 32),
        ("910b2:8", "910B2", 8, 64),
    ],
)
def test_chips_are_found_by_the_parts_of_their_names(
    registry: Registry, text: str, name: str, count: int, gib: float
) -> None:
    found = read_hardware(text, registry)

    assert {each.name for each in found.devices} == {name}
    assert [each.index for each in found.devices] == list(range(count))
    assert found.devices[0].memory_total_bytes == pytest.approx(gib * GIB, rel=0.01)
    assert all(each.sources["memory_total_bytes"].startswith("table: ") for each in found.devices)
    assert len(found.capabilities) == count


def test_a_chip_that_others_are_named_after_says_so(registry: Registry) -> None:
    found = read_hardware("910b", registry)

    assert "bfloat16" not in found.devices[0].dtypes
    assert "there are also 910B1, 910B2" in found.note


def test_a_host_may_be_named_for_offloading(registry: Registry) -> None:
    found = read_hardware("rtx-3090:2+cpu-32c-128gb", registry)

    assert found.backend == "cuda"
    assert found.host_bytes == pytest.approx(128 * GIB, rel=0.03)
    assert read_hardware("rtx-3090", registry).host_bytes is None


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("cpu-16c-64gb", "float32"), ("cpu-16c-64gb-amx_bf16", "bfloat16")],
)
def test_a_cpu_is_named_by_cores_and_memory(registry: Registry, text: str, dtype: str) -> None:
    found = read_hardware(text, registry)

    assert found.backend == "cpu"
    assert found.devices[0].compute_units == 16
    assert found.devices[0].dtypes[0] == dtype
    assert found.devices[0].memory_total_bytes == 64 * GIB


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a10080", "Nearest: .*a100-sxm4-80gb"),
        ("rtx-309", "rtx-3090"),
        ("", "no chip of the catalogue"),
        ("a100-80gb:0", "must be 1 to 1024"),
        ("a100-80gb:many", "must be 1 to 1024, not 'many'"),
        ("cpu-16-64", "written cpu-CORESc-MEMORYgb"),
        ("rtx-3090+128gb", "written cpu-CORESc-MEMORYgb"),
        ("cpu-16c-64gb-mmx", "no CPU feature 'mmx'"),
    ],
)
def test_a_name_that_is_not_known_gets_the_nearest(
    registry: Registry, text: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        read_hardware(text, registry)
