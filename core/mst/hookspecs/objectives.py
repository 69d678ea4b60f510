"""Hooks of an objective."""

# A hook specification is its signature and its docstring; it is never called.
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from __future__ import annotations

from typing import TYPE_CHECKING

from mst.hookspecs.markers import hookspec

if TYPE_CHECKING:
    from mst.objective import Objective
    from mst.request import TrainRequest


@hookspec(firstresult=True)
def mst_objective_name() -> str:
    """Return the objective's short unique name, as users write it after `--task`.

    Called:
        Once, when plugins are loaded, in every process of `mst`.

    Returns:
        Lower-case letters, digits, "-" and "_", beginning with a letter; the names of mst's own
        objectives are taken. An objective always has a name, so there is no way to report nothing.

    If it raises:
        The plugin is listed as failed by `mst plugins`; the others are loaded.

    Example:
        ```python
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_objective_name() -> str:
            return "confident"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_objective(request: TrainRequest) -> Objective:
    """Return what a model is trained for: its rows, its loss and its metrics.

    Called:
        When the request names this objective: once by the command that plans, where torch must
        not be imported, and once in each worker, before the data is read. It has no time limit.

    Args:
        request: what the user asked, every option of it; the ones of other objectives (`beta`,
            `loss_type` and so on) may be read.

    Returns:
        An `Objective`. Its functions are called in the worker; those on rows and examples by the
        planning command too. One that has nothing to measure beside its loss leaves
        `Part.metrics` empty.

    If it raises:
        An `mst.errors.MstError` is printed as it is: raise one for an option that can't be met.
        Any other error is shown as a fault of the plugin.

    Example:
        ```python
        from mst.hookspecs import hookimpl
        from mst.objective import Micro, Objective, Part, label_count
        from mst.request import TrainRequest


        def loss(micro: Micro) -> Part:
            # Cross-entropy that cares less for tokens which the model finds unlikely.
            found = -micro.policy.log_probs * micro.policy.log_probs.detach().exp()
            return Part(found.sum() / micro.totals["tokens"])


        @hookimpl
        def mst_objective(request: TrainRequest) -> Objective:
            return Objective(
                name="confident",
                lacks=lambda row: "" if row.messages else "has no answer: pass --task pt",
                counts=lambda example: {"tokens": label_count(example)},
                loss=loss,
            )
        ```

    Added in 0.1.0.
    """
