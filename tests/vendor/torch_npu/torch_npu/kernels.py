# ruff: noqa: TID253 -- part of torch_npu, which is imported where torch is meant.
"""What some fused kernels of torch_npu compute, in plain torch."""

from __future__ import annotations

import torch


def npu_rms_norm(
    self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / rms(x) * gamma over gamma's dimensions, and 1 / rms(x) in float32."""
    dims = tuple(range(self.dim() - gamma.dim(), self.dim()))
    wide = self.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd).to(self.dtype) * gamma, rstd


def npu_rotary_mul(
    input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half"
) -> torch.Tensor:
    """Return input * r1 + rotated(input) * r2: rotary embedding by cosines r1 and sines r2."""
    if rotary_mode != "half":
        raise NotImplementedError(f"the stand-in has no rotary_mode={rotary_mode!r}, only 'half'")
    first, second = input.chunk(2, dim=-1)
    return input * r1 + torch.cat((-second, first), dim=-1) * r2


def npu_swiglu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return silu(a) * b, where a and b are the halves of the input along `dim`."""
    first, second = self.chunk(2, dim=dim)
    return torch.nn.functional.silu(first) * second
