"""The vendor's manual: every hook of backends, export targets, objectives and serving engines.

A plugin is a module (or object) named by an entry point in group `mst`:

    [project.entry-points.mst]
    mychip = "mst_mychip.backend"

A backend must have `mst_backend_name`, `mst_probe` and `mst_capabilities`; an export target must
have `mst_export_name`, `mst_export_check`, `mst_export` and `mst_export_weights`; an objective must
have `mst_objective_name` and `mst_objective`; an engine must have `mst_engine_name`,
`mst_engine_facts`, `mst_engine_environment` and `mst_engine_command`; the other hooks may be left
out. Each hook is called on one plugin at a time, never on all of them, so a plugin that fails takes
no other with it. A hook may leave out arguments that it does not need. A hook that is unknown to
the installed mst is refused as a misspelling, unless it is marked `hookimpl(optionalhook=True)`.
Each example is run by the tests.
"""

from mst.hookspecs.backends import (
    mst_activate,
    mst_backend_name,
    mst_capabilities,
    mst_environment,
    mst_health,
    mst_probe,
    mst_telemetry,
)
from mst.hookspecs.engines import (
    mst_engine_command,
    mst_engine_environment,
    mst_engine_facts,
    mst_engine_fault,
    mst_engine_name,
)
from mst.hookspecs.export_targets import (
    mst_export,
    mst_export_check,
    mst_export_name,
    mst_export_rounded,
    mst_export_weights,
)
from mst.hookspecs.markers import hookimpl, hookspec
from mst.hookspecs.objectives import mst_objective, mst_objective_name

__all__ = [
    "hookimpl",
    "hookspec",
    "mst_activate",
    "mst_backend_name",
    "mst_capabilities",
    "mst_engine_command",
    "mst_engine_environment",
    "mst_engine_facts",
    "mst_engine_fault",
    "mst_engine_name",
    "mst_environment",
    "mst_export",
    "mst_export_check",
    "mst_export_name",
    "mst_export_rounded",
    "mst_export_weights",
    "mst_health",
    "mst_objective",
    "mst_objective_name",
    "mst_probe",
    "mst_telemetry",
]
