"""Serving a run in the background, and asking it."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mst import background
from mst.background import Work
from mst.errors import MstError
from mst.menu.outcome import show_output
from mst.menu.screen import heading, say, show_command
from mst.menu.session import Session

if TYPE_CHECKING:
    from mst.chat_remote import Remote
    from mst.data.rows import Message

_AT = re.compile(r"^serve +(.+) at (http://\S+)$", re.MULTILINE)
_SECONDS = 0.3
# Of the embedded rows, so that the first question has an answer to be proud of.
DEMO_QUESTION = "I lost my card, what should I do?"
_SYSTEM_ROWS = 20


def serve_and_ask(session: Session, run: Path, key: list[str]) -> None:
    """Serve a run, unless that is done already, and let the person ask."""
    words = session.words
    arguments = ["serve", os.path.relpath(run), "--port", "0", *key]
    heading(words("serve.title"))
    show_command(arguments)
    try:
        work = _served(arguments) or background.start(arguments)
    except MstError as error:
        say(session.words.error(error))
        return
    say(words("serve.loading"))
    address = _address(work)
    if address is None:
        say(words("serve.failed"))
        show_output(words, background.read(work.directory) or work)
        return
    say(words("serve.at", address=address))
    ask_server(session, address, run)
    say(words("serve.stays"))


def _served(arguments: list[str]) -> Work | None:
    """Return the work that serves just this already."""
    here = Path.cwd()
    found = [
        each
        for each in background.works()
        if each.state == "running" and list(each.arguments) == arguments and each.cwd == here
    ]
    return found[-1] if found else None


def address_of(work: Work) -> str | None:
    """Return where a server says that it listens; None while it doesn't, or is none."""
    # It stands before the lines of its requests, of which there may be many.
    found = _AT.search(background.beginning(work)) if work.arguments[0] == "serve" else None
    return None if found is None else found[2]


def _address(work: Work) -> str | None:
    """Wait until a server listens, and return where; None when it has ended."""
    while work.state == "running":
        found = address_of(work)
        if found is not None:
            return found
        time.sleep(_SECONDS)
        work = background.read(work.directory) or work
    return None


def ask_server(session: Session, address: str, run: Path | None) -> None:
    """Ask a server until the person has had enough; each question begins anew.

    Args:
        session: of the menu.
        address: base of the API.
        run: that is served; its training rows' system message goes before each question.
    """
    from mst.chat import Sampling
    from mst.chat_remote import Remote, chosen_model, server_of
    from mst.data.rows import Message
    from mst.seal.audit import open_log, record

    words, given = session.words, ""
    show_command(["chat", "--server", address])
    if run is not None and is_demo(run):
        given = DEMO_QUESTION
    try:
        server = server_of(address)
        with open_log(None, "chat", api="mst.menu"):
            remote = Remote(server, chosen_model(server, None, None), Sampling())
            record("chat.begun", name=remote.model, server=server.shown)
            system = None if run is None else system_of(run)
            if system:
                say(words("serve.system"))
            say(words("serve.leave"))
            before = [Message("system", system)] if system else []
            while question := session.asking.ask(words("serve.question"), given, False):
                _answer(session, remote, [*before, Message("user", question)])
                given = ""
    except EOFError:
        say()
    except MstError as error:
        say(session.words.error(error))


def _answer(session: Session, remote: Remote, messages: list[Message]) -> None:
    """Print an answer as it comes; Ctrl-C stops it alone."""
    from mst.chat_terminal import printable

    print(session.words("serve.answer"), end=" ", flush=True)
    with suppress(KeyboardInterrupt):
        for piece in remote.answer(messages):
            print(printable(piece), end="", flush=True)
    print()


def is_demo(run: Path) -> bool:
    """Return whether a run was trained on the embedded rows."""
    from mst.demo import demo_data

    return demo_data()[0] in _datasets(run)


def _datasets(run: Path) -> tuple[str, ...]:
    from mst import rundir
    from mst.request import TrainRequest

    with suppress(MstError):
        return rundir.read_document(TrainRequest, run, rundir.REQUEST).dataset
    return ()


def system_of(run: Path) -> str | None:
    """Return the system message that all of a run's first training rows share; None for none.

    A model that has always seen one answers worse without it.
    """
    from itertools import islice

    from mst.data.formats import Reading, iter_rows

    found: set[str | None] = set()
    # Rows that need a key, or have gone, have no say.
    with suppress(MstError, OSError):
        for path in _datasets(run)[:1]:
            for row in islice(iter_rows(path, Reading()), _SYSTEM_ROWS):
                first = row.messages[0] if row.messages else None
                found.add(first.content if first and first.role == "system" else None)
    return found.pop() if len(found) == 1 else None
