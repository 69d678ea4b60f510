"""Errors a user can cause: what was asked, what was found, what to do next."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
# A rule of the seal forbids it: the log, the jail or a signature.
EXIT_REFUSED = 3
EXIT_DEVICE_LOST = 4
EXIT_OUT_OF_MEMORY = 5
EXIT_LEAK = 6
# Between the processes of one job; a command never returns it.
EXIT_PEER_FAILED = 70
EXIT_INTERRUPTED = 130


class MstError(Exception):
    """Something the user can mend. The command line prints it without a traceback.

    The message never holds a row, a prompt or a key: it may reach a log.
    """

    exit_code = EXIT_FAILED


class UsageError(MstError):
    """The command line or a YAML file asks for something that does not exist."""

    exit_code = EXIT_USAGE


class NoDeviceError(MstError):
    """No device of the kind that was asked for is usable here."""


class PlanError(MstError):
    """The request cannot be planned on this machine."""


class ModelError(MstError):
    """A model directory is missing, incomplete or of a kind that is refused."""


class DataError(MstError):
    """A data set is missing, malformed or leaves nothing to learn from."""


class EncryptionError(MstError):
    """Encrypted data can't be read, written or trusted, or a key is missing, wrong or exposed."""


class RunError(MstError):
    """A run directory is in use, belongs to another run, or is not whole."""


class BundleError(MstError):
    """A bundle can't be made here, is not whole, or is not what was signed."""


class EvaluationError(MstError):
    """A figure was asked for that can't be had: of these rows, with this metric, or without a
    library.
    """


class AuditError(MstError):
    """The audit log can't be written or doesn't verify, so nothing is begun."""

    exit_code = EXIT_REFUSED


class TrainingError(MstError):
    """Training had to stop; the last good checkpoint is kept."""


class OutOfMemory(TrainingError):
    """The device's memory does not hold what the plan put there.

    Attributes:
        step: optimizer step in which it ran out, from 1; 0 outside the steps.
        micro_batch: rows that were tried; 0 outside the steps.
        peak_bytes: what was in use at the most; None when the device doesn't say.
    """

    exit_code = EXIT_OUT_OF_MEMORY

    def __init__(
        self, message: str, step: int = 0, micro_batch: int = 0, peak_bytes: int | None = None
    ) -> None:
        """Keep what the forecast is judged by."""
        super().__init__(message)
        self.step = step
        self.micro_batch = micro_batch
        self.peak_bytes = peak_bytes


class DeviceLost(TrainingError):
    """The device stopped answering; what was saved before is whole."""

    exit_code = EXIT_DEVICE_LOST


class PeerFailed(MstError):
    """Another rank of the job ended; that rank says why, so this one says nothing."""

    exit_code = EXIT_PEER_FAILED

    def __init__(self) -> None:
        """There is nothing to tell."""
        super().__init__("another process of this job has failed")


class JailError(MstError):
    """The jail that the job was to run in can't be had here; nothing was started."""

    exit_code = EXIT_REFUSED


class LeakError(JailError):
    """The jail was entered, and something inside could get out; nothing was started."""

    exit_code = EXIT_LEAK


class Interrupted(MstError):
    """The user stopped the run; it was saved and can be resumed."""

    exit_code = EXIT_INTERRUPTED
