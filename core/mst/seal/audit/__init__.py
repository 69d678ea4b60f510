"""The audit log: who did what, when, with which data and model; nobody changes it unseen.

Only the process of the command writes it. Workers don't: they run plugins' and vendors' code, and
load models, so they get neither the key nor the log's open files; their parent writes what they
report in the run directory.
"""

from mst.seal.audit.command import open_log, record

__all__ = ["open_log", "record"]
