"""Where the time of optimizer steps goes, by what it is spent on, from torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.train_task import RANK, WARM_UP, Clock

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
# Kinds of work, by words in an operator's name or in that of one that it runs in; the first counts.
KINDS = (
    ("attention", ("block_attention", "scaled_dot_product", "_flash_attention")),
    ("loss: output head, softmax", ("log_softmax", "logsumexp", "nll_loss", "cross_entropy")),
    ("optimizer and clipping", ("Optimizer.", "_fused_adamw", "_foreach_", "clip_grad")),
    ("unpacking quantized weights", ("bitsandbytes::",)),
    ("compiled kernels", ("Torch-Compiled", "CompiledFunction", "CompiledFx")),
)
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::cat", "aten::empty")


class ProfiledClock(Clock):
    """Profiles the steps after the warm-up, each as long as it takes to be reported."""

    def __init__(self, profiler: Any) -> None:
        """Begin with a profiler whose schedule waits for the warm-up."""
        super().__init__()
        self.profiler = profiler

    def step(self, metrics: Any) -> None:
        """Note the step, and have the profiler go on to the next."""
        super().step(metrics)
        self.profiler.step()


def profiled(trace: Path, steps: int) -> Any:
    """Return a profiler of `steps` steps after the warm-up, which writes its trace at their end."""
    from torch.profiler import ProfilerActivity, profile, schedule

    return profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps),
        on_trace_ready=lambda kept: kept.export_chrome_trace(str(trace)),
        record_shapes=True,
    )


def by_kind(events: Iterable[Any], vocabulary: int) -> Counter[str]:
    """Return the microseconds of each kind of work, in operators themselves.

    Args:
        events: of torch's profiler, one for each operator that ran.
        vocabulary: outputs of the output head, by which its products are known.
    """
    found: Counter[str] = Counter()
    for each in events:
        found[_kind(each, vocabulary)] += each.self_cpu_time_total
    return found


def _kind(event: Any, vocabulary: int) -> str:
    if event.name.startswith("ProfilerStep"):
        return "Python, between operators"
    names, outer = [], event
    while outer is not None:
        names.append(outer.name)
        outer = outer.cpu_parent
    if any(word in name for name in names for word in KINDS[0][1]):
        return KINDS[0][0]
    if event.name in PRODUCTS:
        sizes = [size for shape in event.input_shapes for size in shape]
        if vocabulary in sizes:
            return KINDS[1][0]
        return "adapters' products" if RANK in sizes else "frozen weights' products"
    for kind, words in KINDS[1:]:
        if any(word in name for name in names for word in words):
            return kind
    return "casts and copies" if event.name.startswith(COPIES) else "all else, element by element"


def table(events: Iterable[Any], vocabulary: int, steps: int) -> str:
    """Return a table of the milliseconds of a step and their share, the most first.

    Args:
        events: as above, of all steps.
        vocabulary: as above.
        steps: how many they are.
    """
    found = by_kind(events, vocabulary)
    lines = ["| of a step | ms | share |", "|---|---:|---:|"]
    for kind, spent in found.most_common():
        lines.append(f"| {kind} | {spent / 1e3 / steps:.0f} | {spent / found.total():.1%} |")
    return "\n".join(lines)
