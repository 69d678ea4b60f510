"""Tensors that are read and written piece by piece are those of safetensors."""

from __future__ import annotations

import io

from mst.training.tensor_stream import laid_out, tensors_in


def test_the_library_reads_what_is_laid_out_and_the_other_way_round() -> None:
    import torch
    from safetensors.torch import load, save

    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "näme": torch.randn(70_000),
        "number": torch.tensor(4.0),
        "small": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "whole": torch.tensor([2**40, -1]),
    }
    file, size = laid_out(tensors, {"format": "pt"})
    data = file.read()

    assert size == len(data)
    for found in (load(data), tensors_in(io.BytesIO(save(tensors, {"format": "pt"})))):
        assert found.keys() == tensors.keys()
        for name, each in tensors.items():
            assert found[name].dtype == each.dtype
            assert found[name].shape == each.shape
            assert bytes(found[name].reshape(-1).view(torch.uint8).numpy()) == bytes(
                each.reshape(-1).view(torch.uint8).numpy()
            )
