"""The jail around a job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mst.options.option import option

_option = partial(option, group="seal")


@dataclass(frozen=True)
class SealOptions:
    """The group "seal" of `mst.request.TrainRequest`."""

    jail: str = _option(
        "auto",
        "what keeps the job off every network: the strongest layer that this machine gives, or"
        " one of its kinds",
        choices=("auto", "off", "namespace", "broker", "seccomp"),
    )
    jail_reason: str | None = _option(
        None, "why the jail is off; recorded with the run", metavar="TEXT"
    )
    allow_net: tuple[str, ...] = _option(
        (), "networks of the job's other machines, such as 10.0.0.0/24", metavar="CIDR"
    )
