"""Hooks of an export target."""

# A hook specification is its signature and its docstring; it is never called.
# mypy: disable-error-code="empty-body"
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mst.hookspecs.markers import hookspec

if TYPE_CHECKING:
    import torch

    from mst.export import ExportPlan, ExportReport, ExportRequest


@hookspec(firstresult=True)
def mst_export_name() -> str:
    """Return the export target's short unique name, as users write it after `--format`.

    Called:
        Once, when plugins are loaded, in every process of `mst`.

    Returns:
        Lower-case letters, digits, "-" and "_", beginning with a letter. A target always has a
        name, so there is no way to report nothing.

    If it raises:
        The plugin is listed as failed by `mst plugins`; the others are loaded.

    Example:
        ```python
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export_name() -> str:
            return "myformat"
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export_check(request: ExportRequest) -> ExportPlan:
    """Return what an export would do and how it will be judged, before any hour is spent.

    Called:
        By `mst export` before anything is merged, in its own process, without torch. `model_dir` is
        a directory of the same config and the same shapes as the merged model.

    Args:
        request: bits, group size, method and options as the user gave them; None and "auto" are
            yours to choose.

    Returns:
        An `ExportPlan`. There is always one: what can't be done raises.

    If it raises:
        An `mst.errors.MstError` is printed as it is: raise one where architecture, widths, bits,
        group size or a library stand in the way, and say what would do. Any other error is shown
        as a fault of the plugin.

    Example:
        ```python
        from pathlib import Path

        from mst.errors import PlanError
        from mst.export import Bounds, ExportPlan, ExportRequest
        from mst.hookspecs import hookimpl
        from mst.model.facts import read_facts


        @hookimpl
        def mst_export_check(request: ExportRequest) -> ExportPlan:
            if request.bits not in (None, 32):
                raise PlanError(f"--bits {request.bits}: myformat has float32 only. Leave it out.")
            size = 4 * read_facts(Path(request.model_dir)).parameters
            same = Bounds(perplexity_ratio=1.01, mean_kl=0.01, agreement=0.95)
            return ExportPlan("float32", same, disk_bytes=size, memory_bytes=size)
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export(request: ExportRequest) -> ExportReport:
    """Write a merged model in this target's format.

    Called:
        By `mst export`, in a worker process inside the jail, after `mst_export_check`; it may
        import torch and has no time limit. After a kill it is called again with the same
        `work_dir` and may go on from what it left there.

    Args:
        request: the merged model, the directory to write to, rows to calibrate by, and options.

    Returns:
        An `ExportReport`. Tokenizer, template, generation_config.json and config.json must lie in
        the directory too, as transformers loads them; mst adds manifest and README.

    If it raises:
        An `mst.errors.MstError` is printed as it is: it must quote no row. A full disk is told as
        that. Any other error is shown as a fault of the plugin by its type and place, for its text
        may quote a row. The output directory is removed.

    Example:
        ```python
        import shutil
        from pathlib import Path

        from mst.export import ExportReport, ExportRequest
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export(request: ExportRequest) -> ExportReport:
            for each in Path(request.model_dir).iterdir():
                if each.name not in ("manifest.json", "merge.json", "README.md"):
                    shutil.copyfile(each, Path(request.output_dir, each.name))
            files = sorted(each.name for each in Path(request.output_dir).iterdir())
            return ExportReport("myformat", tuple(files))
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export_weights(directory: str) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield what a written artefact computes with, to be compared with what was trained.

    Called:
        By `mst export` in its worker, after `mst_export`.

    Args:
        directory: that `mst_export` has filled.

    Returns:
        Name and value of each weight of the model, as transformers' modules name them (files may
        have other names: `mst.export.loaded.loaded_weights`), in their shapes, any float dtype:
        packed ones unpacked from the files. A head that is tied to the embedding may be left out.
        Yield them one by one, for one at a time is held.

    If it raises:
        The artefact can't be compared, so there is none.

    Example:
        ```python
        from collections.abc import Iterator
        from pathlib import Path
        from typing import Any

        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export_weights(directory: str) -> Iterator[tuple[str, Any]]:
            from safetensors import safe_open

            for path in sorted(Path(directory).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    yield from ((name, file.get_tensor(name)) for name in file.keys())
        ```

    Added in 0.1.0.
    """


@hookspec(firstresult=True)
def mst_export_rounded(request: ExportRequest) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the weights that plain rounding to the same scheme would give, unpacked.

    Called:
        By `mst export` in its worker where the plan's bounds have `beats_rounding`: a method that
        takes minutes must be better than one that takes none. Where memory allows, in a thread of
        its own while `mst_export` runs.

    Args:
        request: as `mst_export` got it, without the directories to write to.

    Returns:
        As `mst_export_weights`.

    If it raises:
        The artefact can't be compared, so there is none.

    Example:
        ```python
        from collections.abc import Iterator
        from pathlib import Path
        from typing import Any

        from mst.export import ExportRequest
        from mst.hookspecs import hookimpl


        @hookimpl
        def mst_export_rounded(request: ExportRequest) -> Iterator[tuple[str, Any]]:
            from safetensors import safe_open

            for path in sorted(Path(request.model_dir).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        yield name, (file.get_tensor(name) * 8).round() / 8
        ```

    Added in 0.1.0.
    """
