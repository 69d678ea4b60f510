"""What libraries load because they find it: a worker's process has only what its plan needs."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Collection

GROUP = "torch.backends"
# PEFT 0.21 imports bitsandbytes, and transformers 5.23 DeepSpeed when it saves, wherever they are
# installed: that costs seconds, writes to the terminal and makes caches. With `kernels`,
# bitsandbytes 0.50 and transformers fetch native code from a hub. Both import torchao, which comes
# with gptqmodel and warns, and PEFT gptqmodel itself.
OPTIONAL = ("bitsandbytes", "deepspeed", "kernels", "torchao", "gptqmodel", "optimum")
# transformers 5.23 imports these beside any model: for losses of object detection, and for models
# that help others. Answers need neither, and scipy alone took 38 MB of a process.
NOT_FOR_ANSWERS = ("scipy", "sklearn")
# Imported likewise, where they are found: for images, which the server refuses, for figures of
# NVIDIA's cards, and for models on several devices. PEFT needs accelerate. They took some 8 MB of a
# server's process (torch 2.13, transformers 5.23).
NOT_FOR_TEXT_ON_A_CPU = ("PIL", "pynvml")
NOT_WITHOUT_ADAPTERS = ("accelerate",)


def hide_packages(keep: Collection[str] = (), also: Collection[str] = ()) -> None:
    """Make optional packages look as if they were not installed.

    Args:
        keep: which of `OPTIONAL` are left to be found.
        also: further ones that the process doesn't need.
    """
    for name in (*OPTIONAL, *also):
        if name not in keep:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def hide_extensions() -> None:
    """Make every extension that is not loaded yet look as if it were not installed.

    transformers imports torch_npu wherever it finds it, and that import fails beside a chip
    without its driver's libraries: a job on the CPU, or on another chip, would fail with it.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        # An extension may be loaded through a module of its own, beside the one of its name.
        # Python takes None for a module that can't be imported (its import system, 5.3.1), and
        # importlib.util.find_spec for one that is not there.
        for name in (point.module.partition(".")[0], point.name):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
