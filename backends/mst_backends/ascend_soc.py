"""What torch_npu says of each Ascend chip by the name that CANN gives it."""

from __future__ import annotations

from collections.abc import Mapping

# torch_npu 2.13.0's is_bf16_supported(), asked on a stub of CANN that bears each of the names in
# its table (tests/backends/test_torch_npu_wheel.py asks again). "910B" without a digit is a 910
# of the first generation with 30 cores, and not one of the 910B1 to 910B4.
FIRST_910 = ("910A", "910B", "910PremiumA", "910ProA", "910ProB")
INFERENCE_310P = ("310P1", "310P2", "310P3", "310P4", "310P5", "310P7")
SECOND_910 = ("910B1", "910B2", "910B2C", "910B3", "910B4", "910B4-1")
# Sold as 910C: two dies a package, each a device.
THIRD_910 = ("9362", "9363", "9372", "9381", "9382", "9391", "9392")
PR_950 = ("950z", "9579", "957b", "957bx", "957c", "957d", "9589", "958b", "9599")
DT_950 = (
    "950x", "950y", "9571", "9572", "9573", "9574", "9575", "9576", "9577", "9578", "9581", "9582",
    "9582x", "9583", "9584", "9585", "9586", "9587", "9588", "9591", "9592", "9595", "9596", "95A1",
    "95A2",
)  # fmt: skip
WITHOUT_BF16 = {f"Ascend{name}" for name in (*FIRST_910, *INFERENCE_310P)}
WITH_BF16 = {
    *(f"Ascend{name}" for name in SECOND_910),
    *(f"Ascend910_{name}" for name in THIRD_910),
    *(f"Ascend950PR_{name}" for name in PR_950),
    *(f"Ascend950DT_{name}" for name in DT_950),
}


def soc_name(printed: str, boards: Mapping[str, str]) -> str:
    """Return CANN's name of a chip from npu-smi's, "Ascend910B3" from "910B3".

    Args:
        printed: as in npu-smi's table.
        boards: the NPU Name of chips whose printed name is that of a whole series: "9392" makes
            "Ascend910" the "Ascend910_9392".
    """
    name = printed if printed.startswith("Ascend") else f"Ascend{printed}"
    return f"{name}_{boards[printed]}" if printed in boards else name


def is_known(soc: str) -> bool:
    """Return whether torch_npu's table, as copied here, has the chip."""
    return soc in WITH_BF16 or soc in WITHOUT_BF16


def dtypes_of(soc: str) -> tuple[str, ...]:
    """Return the dtypes that training should use on a chip, best first; the least when unknown."""
    return ("bfloat16", "float16", "float32") if soc in WITH_BF16 else ("float16", "float32")
