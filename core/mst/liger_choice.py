"""Whether Liger's kernels take the place of a decoder's norms, rotations and gated layers."""

from __future__ import annotations

from mst.errors import PlanError
from mst.plan import Reason
from mst.ranking import Candidate
from mst.space import Space

# Architectures whose gradients with Liger's kernels (0.8.5) were those of the plain layers within
# 1e-4 in float32, in Triton's interpreter: benchmarks/liger_kernels.py.
VERIFIED = frozenset({
    "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "olmo2",
    "phi3", "qwen2", "qwen3", "smollm3",
})  # fmt: skip


def fusing(space: Space, chosen: Candidate, compiled: bool) -> tuple[bool, Reason | None]:
    """Return whether Liger's kernels are used for the chosen candidate, and why or why not.

    Nothing is said of a device that they are not made for.

    Args:
        space: what can be chosen from.
        chosen: of it.
        compiled: the layers are compiled; torch's compiler fuses the same operators.

    Raises:
        PlanError: they were asked for, and can't be used.
    """
    asked = space.request.use_liger_kernel
    if asked == "off":
        return False, None
    obstacle = _obstacle(space, chosen, compiled)
    if asked == "on":
        if obstacle:
            raise PlanError(
                f"--use-liger-kernel on was asked for: {obstacle}. Pass --use-liger-kernel auto."
            )
        return True, None
    if not space.capabilities.liger:
        return False, None
    if not obstacle and space.model.model_type not in VERIFIED:
        obstacle = (
            f"it was not verified for {space.model.model_type}; --use-liger-kernel on tries it"
        )
    why = obstacle or "it is installed, and this run's gradients are compared before the first step"
    return not obstacle, Reason("use_liger_kernel", "off" if obstacle else "on", why)


def _obstacle(space: Space, chosen: Candidate, compiled: bool) -> str:
    made = chosen.configuration
    if not space.capabilities.liger:
        return (
            "it needs the packages liger-kernel and triton (pip install liger-kernel), and a device"
            " that Triton compiles for"
        )
    if compiled:
        return "the layers are compiled, which fuses the same operators"
    if made.row_gradients:
        return "with --dp-epsilon each row's gradient is taken by itself"
    if made.strategy == "zero3":
        return "with zero3 no device holds the whole model that it would be compared with"
    return ""
