# ruff: noqa: TID253 -- importing it is what loads the device, as with the real torch_npu.
"""Stands in for Huawei's torch_npu: the simulated chip, named npu, and reference kernels."""

import simchip
import torch
from simchip import collective
from torch_npu_autoload import environment, version

from torch_npu.attention import npu_fusion_attention
from torch_npu.kernels import npu_rms_norm, npu_rotary_mul, npu_swiglu

__version__ = version()
__all__ = ["npu", "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]

simchip.load("npu", environment())
collective.register("npu", "hccl")
npu = torch.npu
