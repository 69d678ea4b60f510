"""A checkpoint that is written beside the steps that follow it, from a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mst.errors import MstError
from mst.seal.keys.ring import NO_KEYS, KeyRing
from mst.training import checkpoint, faults, parallel, tensor_files, zero
from mst.training.checkpoint import TrainState, checkpoint_path
from mst.training.sealed_directory import empty, seal, whole_or_absent

if TYPE_CHECKING:
    import torch

    from mst.training.session import Session


def begin_save(
    directory: Path,
    state: TrainState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
    random: dict[str, torch.Tensor],
    keys: KeyRing = NO_KEYS,
) -> Callable[[], None]:
    """Copy what `checkpoint.save` would write, and return what writes it: the same bytes.

    The libraries' own files, of a few kilobytes, are there at once; tensors are copied to the
    host. Until all is written it lies under a name that is no checkpoint's.

    Args: those of `checkpoint.save`.

    Raises:
        TrainingError: it can't be written; also from what is returned.
    """
    import torch

    target = checkpoint_path(directory, state.step)
    copies: list[tuple[dict[str, torch.Tensor], Path, dict[str, str] | None]] = []

    def keep(
        tensors: Mapping[str, torch.Tensor],
        path: Path,
        _: KeyRing,
        metadata: dict[str, str] | None = None,
    ) -> None:
        copied = {
            name: each.detach().to("cpu", copy=True).contiguous() for name, each in tensors.items()
        }
        copies.append((copied, path, metadata))

    with torch.no_grad(), whole_or_absent(target) as part:
        empty(part)
        checkpoint.fill(part, state, model, optimizer, names, random, None, keys, keep)

    def write() -> None:
        with whole_or_absent(target) as part:
            while copies:
                tensors, path, metadata = copies.pop()
                tensor_files.write_beside(tensors, path, keys, metadata)
            seal(part, target, keys)

    return write


class Writer:
    """Writes in a thread of its own, one checkpoint at a time, and says how that ended.

    A write that failed raises where it is waited for: at the beginning of a step, before the next
    save or at the end. Leaving the context waits, also after an error or Ctrl-C.
    """

    def __init__(self) -> None:
        """Nothing is on its way."""
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._done: Callable[[], None] = _nothing

    def start(self, write: Callable[[], None], done: Callable[[], None]) -> None:
        """Begin to write; nothing else may be on its way.

        Args:
            write: run in the thread.
            done: run by who waits, once it has been written.
        """
        assert self._pending is None
        self._pending, self._done = self._threads.submit(write), done

    def check(self) -> None:
        """Raise the error of a write that has ended; one that is on its way may go on."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is on its way.

        Raises:
            TrainingError: it could not be written.
        """
        if self._pending is not None:
            pending = self._pending
            pending.exception()
            self._pending = None
            pending.result()
            self._done()

    def __enter__(self) -> Writer:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait; an error that is on its way stays, and tells of a failed write too."""
        try:
            self.wait()
        except MstError as failed:
            if error is None:
                raise
            if isinstance(error, MstError):
                error.args = (f"{error} Besides: {failed}",)
        finally:
            self._threads.shutdown(wait=False)


def _nothing() -> None:
    pass


def save(session: Session, state: TrainState, writer: Writer) -> None:
    """Save where the session stands; on rank 0 that may go on when this returns.

    Raises:
        TrainingError: this checkpoint, or the one before it, can't be written.
    """
    writer.wait()
    with faults.named(session.device, f"while step {state.step} was being saved"):
        random = parallel.gathered(session.group, checkpoint.random_states(session.device))
        shares = None
        if session.zero is not None:
            weights = zero.weights(session.zero, session.group)
            shares = weights, zero.optimizer_tensors(session.zero, session.group)
        if not session.group.first:
            return
        model = session.zero.engine.module if session.zero else session.model
        what = session.checkpoints, state, model, session.optimizer, session.names, random
        write: Callable[[], object]
        if session.plan.async_save:
            write = begin_save(*what, session.keys)
        else:
            write = partial(checkpoint.save, *what, shares, session.keys)

    def write_and_prune() -> None:
        with faults.named(session.device, f"while step {state.step} was being saved"):
            write()
        checkpoint.prune(session.checkpoints, session.request.save_total_limit, state.best_step)

    def told() -> None:
        session.reporter.saved(state.step)

    if session.plan.async_save:
        writer.start(write_and_prune, told)
    else:
        write_and_prune()
        told()
