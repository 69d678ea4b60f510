"""The catalogue of known chips: complete, sourced, strict, found by the drivers' own names."""

from __future__ import annotations

import datetime
import re
import time
import zipfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from mst import catalogue
from mst.catalogue import Figure, KnownChip, find, known_chips, parse

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
WANTED = {
    "cuda": """
        A100-SXM4-40GB A100-SXM4-80GB A100-PCIE-40GB A100-PCIE-80GB A800-SXM4-80GB A800-PCIE-80GB
        A800-PCIE-40GB H100-SXM5-80GB H100-PCIE-80GB H100-NVL-94GB H200-SXM5-141GB H200-NVL-141GB
        H20-96GB L40S A10 V100-SXM2-16GB V100-SXM2-32GB V100-PCIE-16GB T4 RTX-3090 RTX-4090
        RTX-5090 RTX-A6000""",
    "ascend": "910A 910B1 910B2 910B3 910B4 910C 310P",
    "cpu": "AMX AVX512-BF16 AVX512 AVX2 SVE NEON",
}
ONE_CHIP = """
[sources]
sheet = { title = "data sheet, page 2", date = "2026-11-23" }

[[chip]]
backend = "acme"
name = "One"
names = ["Acme One"]
arch = "a1"
dtypes = ["float32"]
memory_mib = [16384, "sheet"]
bandwidth_gb_per_second = [900, "sheet"]
peak_tflops = { source = "sheet", float32 = 10.5 }
"""


def figures(chip: KnownChip) -> Iterator[tuple[str, Figure]]:
    """Yield every figure of a chip with the name of its attribute."""
    for name in ("memory_bytes", "bandwidth_bytes_per_second", "link_bytes_per_second"):
        figure = getattr(chip, name)
        if figure is not None:
            yield name, figure
    for name in ("peak_tflops", "flop_per_cycle"):
        for figure in getattr(chip, name).values():
            yield name, figure


def test_the_chips_that_were_asked_for_are_there() -> None:
    there = {(chip.backend, chip.name) for chip in known_chips()}
    wanted = {(backend, name) for backend, names in WANTED.items() for name in names.split()}

    assert wanted - there == set()
    assert len(there) == len(known_chips())


@pytest.mark.parametrize("chip", known_chips(), ids=lambda chip: f"{chip.backend}-{chip.name}")
def test_every_figure_has_a_source_a_date_and_a_plausible_value(chip: KnownChip) -> None:
    ranges = {
        "memory_bytes": (8 * GIB, 256 * GIB),
        "bandwidth_bytes_per_second": (1e11, 1e13),
        "link_bytes_per_second": (1e11, 2e12),
        "peak_tflops": (5, 1100),
        "flop_per_cycle": (4, 4096),
    }

    for name, figure in figures(chip):
        assert len(figure.source) > 20, name
        assert datetime.date.fromisoformat(figure.date) <= datetime.date(2100, 1, 1)
        least, most = ranges[name]
        assert least <= figure.value <= most, name


@pytest.mark.parametrize("chip", known_chips(), ids=lambda chip: f"{chip.backend}-{chip.name}")
def test_types_and_peaks_agree(chip: KnownChip) -> None:
    peaks = {dtype: figure.value for dtype, figure in chip.peak_tflops.items()}

    assert chip.backend in ("cuda", "ascend", "cpu")
    assert chip.names
    assert set(chip.dtypes) <= {"bfloat16", "float16", "float32"}
    assert len(set(chip.dtypes)) == len(chip.dtypes)
    # bf16 from sm_80; a peak for a type is a promise that the chip computes in it.
    assert ("bfloat16" in chip.dtypes) == (chip.arch not in ("sm70", "sm75")) or (
        chip.backend != "cuda"
    )
    assert set(peaks) - {"tf32"} <= set(chip.dtypes)
    if "bfloat16" in peaks and chip.backend == "cuda":
        assert peaks["bfloat16"] == peaks["float16"] > peaks["float32"]
        assert peaks["bfloat16"] == pytest.approx(2 * peaks["tf32"], rel=0.02)


@pytest.mark.parametrize("chip", known_chips(), ids=lambda chip: f"{chip.backend}-{chip.name}")
def test_every_listed_name_finds_its_chip(chip: KnownChip) -> None:
    memory = None if chip.memory_bytes is None else int(chip.memory_bytes.value)

    for name in chip.names:
        assert find(chip.backend, name, memory) == chip
        assert find("no-such-backend", name, memory) is None


def test_no_two_chips_share_a_name_and_a_size() -> None:
    seen = [
        (chip.backend, name, chip.memory_bytes and chip.memory_bytes.value)
        for chip in known_chips()
        for name in chip.names
    ]

    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("name", "memory_mib", "found"),
    [
        # memory.total as nvidia-smi shows it: below the round number, with error correction.
        ("NVIDIA A10", 23028, "A10"),
        ("Tesla V100-SXM2-32GB", 32510, "V100-SXM2-32GB"),
        ("NVIDIA H200", 143771, "H200-SXM5-141GB"),
        ("NVIDIA GeForce RTX 3090", None, "RTX-3090"),
        ("nvidia geforce rtx 3090", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", 24576, None),
        # A slice of an A100, and a 4090 that somebody gave more memory.
        ("NVIDIA A100-SXM4-80GB", 9856, None),
        ("NVIDIA GeForce RTX 4090", 49140, None),
    ],
)
def test_only_the_exact_name_of_a_whole_chip_is_found(
    name: str, memory_mib: int | None, found: str | None
) -> None:
    chip = find("cuda", name, None if memory_mib is None else memory_mib * 2**20)

    assert (chip and chip.name) == found


def test_memory_tells_chips_of_one_name_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ONE_CHIP.partition("[[chip]]")
    large = small[1] + small[2].replace("16384", "32768").replace('"One"', '"Two"')
    monkeypatch.setattr(catalogue, "known_chips", lambda: parse(ONE_CHIP + large))

    names = [
        (chip := find("acme", "Acme One", size and size * GIB)) and chip.name
        for size in (15, 32, 24, None)
    ]

    assert names == ["One", "Two", None, None]


def test_units_are_bytes() -> None:
    (chip,) = parse(ONE_CHIP)

    assert chip.memory_bytes == Figure(16 * GIB, "data sheet, page 2", "2026-11-23")
    assert chip.bandwidth_bytes_per_second is not None
    assert chip.bandwidth_bytes_per_second.value == 9e11
    assert chip.peak_tflops["float32"].value == 10.5
    assert chip.link_bytes_per_second is None


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("memory_mib", "memory_mb", "chip 'One': unknown key 'memory_mb'"),
        ('arch = "a1"', "", "chip 'One': key 'arch' is missing"),
        ("float32 = 10.5", "fp32 = 10.5", "chip 'One', peak_tflops: unknown key 'fp32'"),
        ('source = "sheet", ', "", "chip 'One', peak_tflops: key 'source' is missing"),
        ('[900, "sheet"]', '[900, "shet"]', "bandwidth_gb_per_second: no source 'shet'"),
        ('[900, "sheet"]', "900", 'bandwidth_gb_per_second: 900 is not [number, "source"]'),
        ('[900, "sheet"]', '["900", "sheet"]', "bandwidth_gb_per_second: '900' is not a number"),
        ("title =", "titel =", "source 'sheet': unknown key 'titel'"),
        ("[[chip]]", "[[chips]]", "the catalogue: unknown key 'chips'"),
    ],
)
def test_a_mistake_in_the_file_is_named(right: str, wrong: str, message: str) -> None:
    assert right in ONE_CHIP

    with pytest.raises(ValueError, match=re.escape(message)):
        parse(ONE_CHIP.replace(right, wrong))


def test_what_sources_contradict_each_other_about_is_unknown() -> None:
    for name in ("910B1", "910B2", "910B3", "910B4"):
        chip = find("ascend", name)

        assert chip is not None
        assert chip.peak_tflops == {}
        assert chip.bandwidth_bytes_per_second is None


def test_every_source_is_cited() -> None:
    cited = {figure.source for chip in known_chips() for _, figure in figures(chip)}
    text = files("mst").joinpath("catalogue.toml").read_text(encoding="utf-8")
    titles = set(re.findall(r'title = "(.+?)", date', text))

    assert titles == cited


def test_reading_the_catalogue_is_quick() -> None:
    text = files("mst").joinpath("catalogue.toml").read_text(encoding="utf-8")
    taken = []
    for _ in range(5):
        start = time.process_time()
        parse(text)
        taken.append(time.process_time() - start)

    # It takes 4 ms on one core of an AMD EPYC (Zen 5).
    assert min(taken) < 0.02


def test_the_wheel_has_the_catalogue(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")

    wheel = next(builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))

    assert "mst/catalogue.toml" in zipfile.ZipFile(wheel).namelist()
