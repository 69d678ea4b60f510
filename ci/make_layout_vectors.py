"""Write tests/data/layouts/vectors.safetensors anew: weights that the libraries themselves packed.

Needs gptqmodel 7.6.0 and compressed-tensors 0.20.0, which nothing else here does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TARGET = Path(__file__).resolve().parents[1] / "tests/data/layouts/vectors.safetensors"
OUT, IN, GROUP = 16, 96, 32


def main() -> None:
    """Pack one weight in every layout."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weight = (0.05 * torch.randn(OUT, IN)).half().float()
    vectors = {"weight": weight}
    for name, bits, packed in (
        ("gptq", 4, _gptq(weight, 4)),
        ("gptq", 8, _gptq(weight, 8)),
        ("awq", 4, _awq(weight)),
        ("compressed-tensors", 4, _pack_quantized(weight, 4)),
        ("compressed-tensors", 8, _pack_quantized(weight, 8)),
    ):
        vectors |= {f"{name}.{bits}.{key}": value for key, value in packed.items()}
    save_file(vectors, TARGET)


def _symmetric(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return float16 scales (out, groups), as the libraries choose them."""
    largest = weight.reshape(OUT, -1, GROUP).abs().amax(-1)
    scales: torch.Tensor = (largest * 2 / (2**bits - 1)).half().float()
    return scales


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    import torch

    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight
    return linear


def _layer(kind: Any, bits: int, symmetric: bool) -> Any:
    return kind(
        bits=bits,
        group_size=GROUP,
        sym=symmetric,
        desc_act=False,
        in_features=IN,
        out_features=OUT,
        register_buffers=True,
    )


def _gptq(weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = _layer(TorchLinear, bits, symmetric=True)
    scales = _symmetric(weight, bits)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    groups = torch.arange(IN, dtype=torch.int32) // GROUP
    layer.pack_original(_linear(weight), scales, zeros, groups)
    dequantized = layer.dequantize_weight().T.contiguous()
    convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=GROUP))
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(layer, name) for name in names} | {"dequantized": dequantized}


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer = _layer(AwqTorchLinear, 4, symmetric=False)
    groups = weight.reshape(OUT, -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high / 15 - low / 15).half().float()
    layer.pack(_linear(weight), scales, (-low / scales).round().clamp(0, 15))
    dequantized = layer(torch.eye(IN).half()).T.contiguous()
    names = ("qweight", "qzeros", "scales")
    return {name: getattr(layer, name) for name in names} | {"dequantized": dequantized}


def _pack_quantized(weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=GROUP
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": weight, "weight_scale": _symmetric(weight, bits)}
    compressor: Any = PackedQuantizationCompressor
    packed: dict[str, torch.Tensor] = compressor.compress(state, scheme)
    return packed | {"dequantized": compressor.decompress(packed, scheme)["weight"]}


if __name__ == "__main__":
    main()
