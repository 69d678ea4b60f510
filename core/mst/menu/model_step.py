"""Which model: those in the local places, with their size and whether they can be tuned here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst.errors import MstError
from mst.menu.asking import BACK
from mst.menu.screen import heading, next_page, padded, say, shortened, show_command
from mst.menu.session import Session, run_here
from mst.quantities import gib

if TYPE_CHECKING:
    from mst.model.found import FoundModel

_EMBEDDED, _OWN, _MORE, _FETCH = "<embedded>", "<own>", "<more>", "<fetch>"
_HUBS = ("modelscope", "huggingface")
_PAGE = 6
_NAME_COLUMNS = 26


def choose_model(session: Session) -> str:
    """Let the person choose the model; returns `BACK`, or "next"."""
    words = session.words
    heading(words("model.title"))
    show_command(["models", "list"])
    found = _usable_first(session)
    if not found:
        _say_where(session)
    start = 0
    while True:
        page = found[start : start + _PAGE]
        choices = [(_value(each), _label(session, each)) for each in page]
        if len(found) > _PAGE:
            choices.append((_MORE, words("model.more")))
        choices += [(_OWN, words("model.own")), (_FETCH, words("model.fetch"))]
        default = session.draft.model or _EMBEDDED
        chosen = session.choose(words("model.question"), choices, default)
        if chosen == BACK:
            return BACK
        if chosen == _MORE:
            start = next_page(start, _PAGE, len(found))
        elif chosen == _FETCH:
            _fetch(session)
            found, start = _usable_first(session), 0
        elif _take(session, found, chosen):
            return "next"


def _take(session: Session, found: list[FoundModel], chosen: str) -> bool:
    """Keep the chosen model; False where it can't be used."""
    words = session.words
    if chosen == _OWN:
        path = session.edited(words("model.path"), session.draft.model or "", True)
        return _take_path(session, path) if path else False
    model = next(each for each in found if _value(each) == chosen)
    if model.problem:
        say(words.said(model.problem))
        return False
    session.keep(replace(session.draft, model=None if chosen == _EMBEDDED else chosen))
    return True


def _take_path(session: Session, path: str) -> bool:
    from mst.model.locate import locate

    try:
        source = locate(path, (), session.environ)
    except MstError as error:
        say(session.words.error(error))
        return False
    session.keep(replace(session.draft, model=str(source.path.absolute())))
    return True


def _usable_first(session: Session) -> list[FoundModel]:
    """Return the models that are here: those that can be tuned, by size, then the others."""
    from mst.model.found import found_models

    return sorted(found_models(session.environ), key=lambda each: (bool(each.problem), each.bytes))


def _value(model: FoundModel) -> str:
    from mst.model.places import EMBEDDED

    return _EMBEDDED if model.place == EMBEDDED else str(Path(model.path).absolute())


def _label(session: Session, model: FoundModel) -> str:
    name = padded(shortened(model.name, _NAME_COLUMNS), _NAME_COLUMNS)
    return f"{name}  {padded(gib(model.bytes), 10)}  {_fits(session, model)}"


def _fits(session: Session, model: FoundModel) -> str:
    """Return whether a model can be tuned here, in a few words."""
    from mst.model.ways import ways_here

    words = session.words
    if model.problem:
        return words("model.unusable")
    if _value(model) == _EMBEDDED:
        return words("model.embedded")
    if model.facts is None:
        return words("model.not_looked_at")
    ways = [each for each in ways_here(model.facts, session.facts()) if each.fits]
    if not ways:
        return words("model.too_large")
    tuners = dict.fromkeys(each.tuner for each in ways)
    return words("model.fits") if "lora" in tuners else words("model.fits_qlora")


def _say_where(session: Session) -> None:
    """Say where models were looked for, and how to add one."""
    from mst.model.places import places

    say(session.words("model.none"))
    for each in places((), session.environ):
        print(f"  {each.path}")
    say(session.words("model.add"))


def _fetch(session: Session) -> None:
    """Fetch a model over the network, after a clear question."""
    words = session.words
    say(words("model.fetch_means"))
    hub = session.choose(words("model.fetch_hub"), [(each, each) for each in _HUBS])
    name = "" if hub == BACK else session.asking.ask(words("model.fetch_name"), "", False)
    if not name:
        return
    arguments = ["models", "pull", name, "--from", hub]
    show_command(arguments)
    if not session.confirmed(words("model.fetch_sure", name=name, hub=hub)):
        return
    # Hubs send us to other hosts for large files; each is named by the person, or not asked.
    while run_here([*arguments, "--yes"]) != 0:
        host = session.asking.ask(words("model.fetch_host"), "", False)
        if not host:
            return
        arguments += ["--allow-host", host]
        show_command(arguments)
