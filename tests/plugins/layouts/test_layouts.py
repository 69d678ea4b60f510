"""What the libraries packed is read and packed again to the same bits; round trips are exact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_plugins.layouts import words
from mst_plugins.layouts.layout import LAYOUTS
from mst_plugins.layouts.rounding import Quantized, dequantize, round_to_nearest

if TYPE_CHECKING:
    import torch

VECTORS = Path(__file__).resolve().parents[2] / "data/layouts/vectors.safetensors"
CASES = [(name, bits) for name, layout in LAYOUTS.items() for bits in layout.BITS]
SCHEMES = [(name, bits, symmetric) for name, bits in CASES for symmetric in LAYOUTS[name].SYMMETRIC]
GROUP_SIZE = 32


def vectors(name: str, bits: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Return the weight, a library's tensors of it, and what that library makes of these again."""
    from safetensors.torch import load_file

    found = load_file(VECTORS)
    prefix = f"{name}.{bits}."
    tensors = {
        key.removeprefix(prefix): each for key, each in found.items() if key.startswith(prefix)
    }
    dequantized = tensors.pop("dequantized")
    # The compressor keeps scales in the weight's dtype; float16 holds these exactly.
    if "weight_scale" in tensors:
        tensors["weight_scale"] = tensors["weight_scale"].half()
    return found["weight"], tensors, dequantized


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_what_a_library_packed_stands_for_the_weights_that_it_says(name: str, bits: int) -> None:
    import torch

    _, tensors, dequantized = vectors(name, bits)
    ours = dequantize(LAYOUTS[name].unpack(tensors, bits))

    # The kernels multiply in float16.
    assert torch.equal(ours.to(dequantized.dtype), dequantized)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_weight_is_rounded_and_packed_to_the_library_s_very_bits(name: str, bits: int) -> None:
    import torch

    weight, tensors, _ = vectors(name, bits)
    layout = LAYOUTS[name]
    rounded = round_to_nearest(weight, bits, GROUP_SIZE, symmetric=layout.SYMMETRIC[0])
    packed = layout.pack(rounded)

    assert packed.keys() == tensors.keys()
    for key, each in packed.items():
        assert each.dtype == tensors[key].dtype
        assert torch.equal(each, tensors[key]), key


@st.composite
def quantized(draw: st.DrawFn, bits: int, symmetric: bool) -> Quantized:
    """Return any layer: the codes of all its bits, and scales, zero points among 0 and the last."""
    import torch

    out, groups = 8 * draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(2**bits, (out, groups * GROUP_SIZE), generator=generator)
    zeros = torch.randint(2**bits, (out, groups), generator=generator)
    if symmetric:
        zeros = torch.full((out, groups), 2 ** (bits - 1))
    scales = torch.rand(out, groups, generator=generator).half()
    return Quantized(codes.byte(), scales, zeros.byte(), bits, symmetric)


@pytest.mark.parametrize(("name", "bits", "symmetric"), SCHEMES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_unpacking_returns_what_was_packed(
    data: st.DataObject, name: str, bits: int, symmetric: bool
) -> None:
    import torch

    layer = data.draw(quantized(bits, symmetric))
    tensors = LAYOUTS[name].pack(layer)
    again = LAYOUTS[name].unpack(tensors, bits)
    out, width = layer.codes.shape

    assert LAYOUTS[name].check(tensors, out, width, bits, GROUP_SIZE) == []
    assert torch.equal(again.codes, layer.codes)
    assert torch.equal(again.zeros, layer.zeros)
    assert torch.equal(again.scales, layer.scales)
    assert again.group_size == GROUP_SIZE


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_wrong_shape_dtype_or_name_is_told(name: str, bits: int) -> None:
    _, tensors, _ = vectors(name, bits)
    layout = LAYOUTS[name]
    scales = next(key for key in tensors if "scale" in key)
    codes = next(key for key in tensors if key in ("qweight", "weight_packed"))
    changed = {
        "transposed": tensors | {codes: tensors[codes].T},
        "in float32": tensors | {scales: tensors[scales].float()},
        "missing": {key: each for key, each in tensors.items() if key != codes},
        "beside": tensors | {"bias2": tensors[scales]},
    }

    assert layout.check(tensors, 16, 96, bits, GROUP_SIZE) == []
    for what, each in changed.items():
        assert len(layout.check(each, 16, 96, bits, GROUP_SIZE)) == 1, what
    assert layout.check(tensors, 16, 96, bits, 48) != []


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([0.01, 1.0, 1000.0]))
def test_rounding_errs_by_a_step_at_most(
    bits: int, symmetric: bool, seed: int, size: float
) -> None:
    import torch

    weight = size * torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_nearest(weight, bits, GROUP_SIZE, symmetric=symmetric)
    error = (dequantize(rounded) - weight).reshape(8, -1, GROUP_SIZE).abs().amax(-1)

    # Half a step inside; at the ends, what rounding the scale or the zero point cuts off beside.
    assert (error <= 1.1 * rounded.scales.float()).all()
    assert (rounded.scales > 0).all()


def test_a_group_of_zeros_stays_zero() -> None:
    import torch

    for symmetric in (True, False):
        rounded = round_to_nearest(torch.zeros(8, 64), 4, GROUP_SIZE, symmetric=symmetric)

        assert (dequantize(rounded) == 0).all()


def test_scales_of_a_bfloat16_weight_fit_into_bfloat16() -> None:
    import torch

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    scales = round_to_nearest(weight, 4, GROUP_SIZE, symmetric=False).scales

    assert torch.equal(scales.bfloat16().half(), scales)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (1e7, "float16")])
def test_weights_that_have_no_scale_are_refused(value: float, said: str) -> None:
    import torch

    from mst.errors import ModelError

    weight = torch.zeros(8, 64)
    weight[3, 40] = value

    with pytest.raises(ModelError, match=said):
        round_to_nearest(weight, 4, GROUP_SIZE, symmetric=True)


def test_the_first_value_of_a_word_has_its_lowest_bits() -> None:
    import torch

    assert words.pack(torch.arange(8), 4).tolist() == [0x76543210]
    assert words.pack(torch.tensor([0, 0, 0, 255]), 8).tolist() == [-(1 << 24)]
    assert words.pack(torch.arange(8), 4, (0, 2, 4, 6, 1, 3, 5, 7)).tolist() == [0x75316420]
