"""What the page's server does: decided in the command, and handed to the worker in the jail."""

from __future__ import annotations

from dataclasses import dataclass

from mst.errors import MstError
from mst.serve.packages import lacking

PACKAGES = ("uvicorn", "pydantic")
LANGUAGES = ("auto", "zh", "en")


class PageError(MstError):
    """The page can't be shown."""


@dataclass(frozen=True)
class LocalModel:
    """A model that `mst models list` shows; its path is absolute."""

    name: str
    path: str


@dataclass(frozen=True)
class Places:
    """Directories that the user named, and models that lay here at the start; all are absolute.

    Attributes:
        runs: in which runs lie, and are made.
        data: under which files of rows lie.
        models: in which models lie.
        local_models: of the local places, looked for outside the jail.
    """

    runs: tuple[str, ...]
    data: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    local_models: tuple[LocalModel, ...] = ()


@dataclass(frozen=True)
class UiJob:
    """What the worker serves.

    Attributes:
        places: whose runs, and what new ones may be made of.
        port: of the page, for its link and its cookie's name.
        language: of `LANGUAGES`; "auto" is the browser's.
        samples: sample answers are shown.
        actions: runs can be started, stopped and resumed.
        audit: directory of the audit log.
    """

    places: Places
    port: int
    language: str
    samples: bool
    actions: bool
    audit: str


def check_packages() -> None:
    """Refuse to begin where the `serve` extra is missing.

    Raises:
        PageError: with the command that installs it.
    """
    if told := lacking("mst ui", PACKAGES):
        raise PageError(told)
