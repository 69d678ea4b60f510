"""The first screen, and the ways from it. Work that still runs is offered before all else."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mst import background
from mst.background import Work, run_of
from mst.errors import MstError
from mst.menu.asking import BACK, Choice
from mst.menu.outcome import SEEN, mark_seen
from mst.menu.progress import title_of
from mst.menu.screen import heading, next_page, say, show_command
from mst.menu.session import Session, in_language, run_here
from mst.menu.words import words_of
from mst.translation import language_of

_WORK = "work:"
_CHINESE = "中文 (Chinese)"
# Of the works that ended while nobody looked, the newest.
_UNSEEN = 3
_PAGE = 8
# What reading from a terminal that hung up gives, or writing to it.
_TERMINAL_GONE = (errno.EIO, errno.EBADF, errno.EPIPE, errno.ENXIO)


def home(session: Session) -> bool:
    """Show the first screen once, and go where the person wants; False to leave."""
    words = session.words
    heading(words("home.title"))
    show_command(["menu"])
    if session.asking.animated:
        say(words("asking.hint"))
    offered = offered_works()
    if any(each.state == "running" for each in offered):
        say(words("home.still_running"))
    choices = [(f"{_WORK}{each.name}", title_of(words, each)) for each in offered]
    ways = ("tune", "runs", "ask", "machine", "works")
    choices += [(each, words(f"home.{each}")) for each in ways]
    # Who can't read English looks for these two characters.
    in_chinese = words.language == "en" and not session.ascii
    choices.append(("language", _CHINESE if in_chinese else words("home.language")))
    default = choices[0][0] if offered else "tune"
    chosen = session.choose(words("home.question"), choices, default, "home.leave")
    if chosen == BACK:
        return False
    if chosen.startswith(_WORK):
        show_work(session, background.find(chosen.removeprefix(_WORK)))
    else:
        _WAYS[chosen](session)
    return True


def offered_works() -> tuple[Work, ...]:
    """Return what runs, and what has ended unseen, newest first."""
    found = background.works()[::-1]
    running = [each for each in found if each.state == "running"]
    unseen = [
        each for each in found if each.state != "running" and not (each.directory / SEEN).exists()
    ]
    return (*running[:_UNSEEN], *unseen[: max(0, _UNSEEN - len(running))])


def show_work(session: Session, work: Work) -> None:
    """Show a work: as it runs, or what came of it."""
    from mst.menu.outcome import show_outcome
    from mst.menu.run_screen import show_run
    from mst.menu.watching import watch

    if work.state == "running" and work.arguments[0] == "serve":
        _show_server(session, work)
        return
    if work.state == "running":
        work = watch(session, work)
    else:
        heading(title_of(session.words, work))
        show_command(work.arguments)
    show_outcome(session.words, work)
    run = run_of(work)
    if work.state == "running":
        return
    if run is not None and (run / "run.json").is_file():
        show_run(session, run)


def _show_server(session: Session, work: Work) -> None:
    """Ask a running server, or stop it."""
    from mst.menu.serving import address_of, ask_server

    words, address = session.words, address_of(work)
    heading(title_of(words, work))
    show_command(work.arguments)
    say(words("serve.at", address=address) if address else words("serve.loading"))
    ways = ("ask", "stop") if address else ("stop",)
    chosen = session.choose(
        words("serve.what"), [(each, words(f"serve.{each}")) for each in ways], ways[0]
    )
    if chosen == "stop":
        background.stop(work)
        mark_seen(work)
        say(words("serve.stopping"))
    elif chosen == "ask" and address is not None:
        run = work.cwd / work.arguments[1]
        ask_server(session, address, run if run.is_dir() else None)


def _tune(session: Session) -> None:
    """Go through the steps to a run; each keeps what was chosen, and leads back."""
    from mst.menu.data_step import choose_data
    from mst.menu.goal_step import choose_goal, choose_settings
    from mst.menu.model_step import choose_model
    from mst.menu.plan_step import plan_and_start

    steps = (choose_model, choose_data, choose_goal, choose_settings, plan_and_start)
    at = 0
    while 0 <= at < len(steps):
        try:
            answer = steps[at](session)
        except KeyboardInterrupt:
            if _leaves(session):
                raise EOFError from None
            continue
        if answer == "home":
            return
        at += -1 if answer == BACK else 1


def _runs(session: Session) -> None:
    """Let the person choose one of the runs in ./runs."""
    from mst.menu.run_screen import show_run
    from mst.runs import RUNS, list_runs

    words, start = session.words, 0
    while True:
        heading(words("runs.title"))
        show_command(["runs", "list"])
        found = list_runs(RUNS)[::-1] if RUNS.is_dir() else ()
        found = tuple(each for each in found if each.state not in ("not a run", "damaged"))
        if not found:
            say(words("runs.none", directory=Path.cwd() / RUNS))
            return
        page = found[start : start + _PAGE]
        choices = [
            (each.path, f"{words(f'state.{each.state}')}  {each.steps or 0:>6}  {each.name}")
            for each in page
        ]
        if len(found) > _PAGE:
            choices.append(("more", words("model.more")))
        chosen = session.choose(words("runs.question"), choices)
        if chosen == BACK:
            return
        if chosen == "more":
            start = next_page(start, _PAGE, len(found))
        else:
            show_run(session, Path(chosen))


def _ask(session: Session) -> None:
    """Talk to the newest finished run, or the embedded model, in this terminal."""
    heading(session.words("home.ask"))
    say(session.words("ask.means"))
    arguments = in_language(session.words, ["chat"])
    show_command(arguments)
    run_here(arguments, session.words)


def _works(session: Session) -> None:
    """Let the person choose one of the works in the background."""
    words = session.words
    found = sorted(background.works()[::-1], key=lambda each: each.state != "running")[:_PAGE]
    heading(words("works.title"))
    show_command(["menu"])
    if not found:
        say(words("works.none"))
        return
    choices = [(each.name, title_of(words, each)) for each in found]
    chosen = session.choose(words("works.question"), choices)
    if chosen != BACK:
        with suppress(background.BackgroundError):
            show_work(session, background.find(chosen))


def _language(session: Session) -> None:
    """Speak the other language."""
    other = "en" if session.words.language == "zh" else "zh"
    found = language_of(other, session.environ, sys.stdout.encoding)
    if found != other:
        say(session.words("home.no_chinese"))
    session.words = words_of(found)
    if session.asking.in_words is not None:
        session.asking = session.asking.in_words(session.words)


def _machine(session: Session) -> None:
    from mst.menu.machine_screen import show_machine

    show_machine(session)


_WAYS: dict[str, Callable[[Session], None]] = {
    "tune": _tune,
    "runs": _runs,
    "ask": _ask,
    "machine": _machine,
    "works": _works,
    "language": _language,
}


def loop(session: Session) -> int:
    """Show the menu until the person leaves; what runs in the background goes on."""
    while True:
        try:
            if not home(session):
                break
        except KeyboardInterrupt:
            if _leaves(session):
                break
        except EOFError:  # the terminal is gone, or Ctrl-D
            break
        except MstError as error:
            say(session.words.error(error))
        except OSError as error:
            if error.errno in _TERMINAL_GONE:
                break
            say(session.words("home.system", reason=error.strerror or type(error).__name__))
    _farewell(session)
    return 0


def _leaves(session: Session) -> bool:
    """Ask whether Ctrl-C meant to leave; a second one does."""
    try:
        choices = [
            ("leave", session.words("home.leave")),
            (BACK, session.words("home.stay")),
        ]
        asked = session.words("home.interrupted")
        return session.asking.choose(asked, [Choice(*each) for each in choices], "leave") == "leave"
    except (KeyboardInterrupt, EOFError):
        return True


def _farewell(session: Session) -> None:
    running = [each for each in background.works() if each.state == "running"]
    with suppress(OSError):  # nobody may be there to read it
        if running:
            say(session.words("home.goes_on", count=len(running)))
        say(session.words("home.bye", directory=os.getcwd()))
