"""Every check of the kit: its stable id, the promise it proves, where it runs and for how long."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mst.conformance.findings import Context, Finding
from mst.errors import UsageError

# In a plain process of mst without torch, or in a worker of the backend after mst_activate.
HOST, DEVICE = "host", "device"
# What a worker says it is at while it activates the device for a check.
ACTIVATION = "mst_activate"
_LOADED = ("loading.plugin",)
_PROBED = (*_LOADED, "probe.answers", "facts.typed")
_ACTIVE = (*_PROBED, "activation.repeats", "activation.torch")


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        id: stable, for `--only` and for reports.
        title: the promise, as a sentence.
        place: HOST or DEVICE.
        function: "module:function" in this package; "operators:GROUP" for an operator group.
        seconds: after so long it counts as hanging.
        needs: ids of checks without which it makes no sense.
    """

    id: str
    title: str
    place: str
    function: str
    seconds: float
    needs: tuple[str, ...]


def _operators() -> tuple[Check, ...]:
    subjects = {
        "products": "matrix products", "pointwise": "pointwise operators",
        "reductions": "reductions and norms", "shapes": "copies and changes of shape",
        "attention": "attention and rotary embedding", "indexing": "indexing and embedding",
        "loss": "losses", "optimizer": "AdamW and gradient clipping",
        "random": "random operators",
    }  # fmt: skip
    return tuple(
        Check(
            f"operators.{group}",
            f"{title} agree with the CPU, forward and backward",
            DEVICE,
            f"operators:{group}",
            120,
            _ACTIVE,
        )
        for group, title in subjects.items()
    )


CHECKS: tuple[Check, ...] = (
    Check("loading.plugin", "the plugin loads, with the hooks of a backend",
          HOST, "hooks:plugin_loads", 30, ()),
    Check("loading.name", "no other plugin claims the name",
          HOST, "hooks:name_is_its_own", 30, ()),
    Check("probe.answers", "the probe never raises, and finds a usable device",
          HOST, "hooks:probe_answers", 60, _LOADED),
    Check("probe.light", "nothing but activation imports torch",
          HOST, "hooks:probe_is_light", 60, _LOADED),
    Check("probe.fast", "the probe takes less than 2 s, each hook less than 5 s",
          HOST, "hooks:probe_is_fast", 60, _LOADED),
    Check("probe.quiet", "the hooks print nothing on standard output",
          HOST, "hooks:probe_is_quiet", 60, _LOADED),
    Check("probe.repeats", "two probes give the same answer",
          HOST, "hooks:probe_repeats", 60, _LOADED),
    Check("probe.survives", "the probe answers without PATH, HOME and a directory to write",
          HOST, "hooks:probe_survives", 60, _LOADED),
    Check("facts.typed", "every answer has the types of mst.facts",
          HOST, "facts:facts_are_typed", 60, _LOADED),
    Check("facts.plausible", "names, indices, dtypes and figures are plausible",
          HOST, "facts:facts_are_plausible", 30, _PROBED),
    Check("facts.sources", "every number says where it came from",
          HOST, "facts:numbers_have_sources", 30, _PROBED),
    Check("facts.capabilities", "capabilities use names that the planner knows",
          HOST, "facts:capabilities_are_known", 30, _PROBED),
    Check("facts.health", "health comes back in time, as sentences",
          HOST, "facts:health_answers", 30, _PROBED),
    Check("environment.text", "the worker's variables are text and name its devices",
          HOST, "facts:environment_is_text", 30, _PROBED),
    Check("environment.narrows", "a worker sees only the devices that it was given",
          HOST, "facts:environment_narrows", 240, (*_PROBED, "environment.text")),
    Check("activation.repeats", "activation works, and again in the same process",
          DEVICE, "activation:activation_repeats", 120, (*_PROBED, "environment.text")),
    Check("activation.torch", "torch computes on the device and counts it",
          DEVICE, "activation:torch_knows", 60, (*_PROBED, "activation.repeats")),
    Check("activation.second", "tensors cross to the second device",
          DEVICE, "activation:second_device", 60, _ACTIVE),
    Check("dtypes.declared", "declared dtypes multiply as the CPU does",
          DEVICE, "dtypes:declared_dtypes", 60, _ACTIVE),
    *_operators(),
    Check("memory.counted", "memory in use and its peak are counted",
          DEVICE, "memory:memory_is_counted", 60, _ACTIVE),
    Check("memory.total", "torch and the probe agree on the size of the memory",
          DEVICE, "memory:total_is_the_probes", 60, _ACTIVE),
    Check("memory.runs_out", "running out of memory can be caught, and the device goes on",
          DEVICE, "memory:running_out_is_caught", 60, _ACTIVE),
    Check("seeding.repeats", "a seed brings the same draws back, another seed others",
          DEVICE, "seeding:seeds_repeat", 60, _ACTIVE),
    Check("seeding.state", "a saved state of the generator can be restored",
          DEVICE, "seeding:states_return", 60, _ACTIVE),
    Check("checkpoint.returns", "a checkpoint is bit for bit the same on the CPU and back",
          DEVICE, "transfer:checkpoint_returns", 60, _ACTIVE),
    Check("checkpoint.crosses", "a checkpoint of one device loads on another",
          DEVICE, "transfer:checkpoint_crosses", 60, _ACTIVE),
    Check("timing.synchronize", "synchronize() waits for the device",
          DEVICE, "timing:synchronize_waits", 60, _ACTIVE),
    Check("timing.product", "a matrix product is as fast as declared, and no faster",
          DEVICE, "timing:product_speed", 120, _ACTIVE),
    Check("timing.copy", "a copy is as fast as declared, and no faster",
          DEVICE, "timing:copy_speed", 120, _ACTIVE),
    Check("dtypes.undeclared", "dtypes that are not declared are refused before a job starts",
          HOST, "dtypes:undeclared_dtypes", 240, _PROBED),
    Check("collectives.agree", "two processes agree on sums, copies, parts and gradients",
          HOST, "collectives:collectives_agree", 300, _ACTIVE),
    Check("training.losses", "`mst train` has the CPU's losses in float32",
          HOST, "training:losses_match", 420, _ACTIVE),
    Check("training.low_precision", "`mst train` has losses near float32's in 16 bits",
          HOST, "training:low_precision_matches", 620, _ACTIVE),
    Check("training.resume", "a resumed run ends as the uninterrupted one",
          HOST, "training:resume_continues", 420, _ACTIVE),
)  # fmt: skip


def by_id(id: str) -> Check:
    """Return the check of this id."""
    return next(check for check in CHECKS if check.id == id)


def function_of(check: Check) -> Callable[[Context], Finding]:
    """Import and return what a check runs."""
    module, _, name = check.function.partition(":")
    found = importlib.import_module(f"mst.conformance.{module}")
    if module == "operators":
        return found.operator_check(name)  # type: ignore[no-any-return]
    function: Callable[[Context], Finding] = getattr(found, name)
    return function


def chosen(only: Sequence[str]) -> tuple[Check, ...]:
    """Return the checks with these ids, or those whose subject (before the ".") it is; else all.

    Raises:
        UsageError: an id is unknown.
    """
    for each in only:
        if not any(each in (check.id, check.id.partition(".")[0]) for check in CHECKS):
            raise UsageError(
                f"--only {each}: there is no such check (known:"
                f" {', '.join(check.id for check in CHECKS)})."
            )
    return tuple(
        check for check in CHECKS
        if not only or check.id in only or check.id.partition(".")[0] in only
    )  # fmt: skip
