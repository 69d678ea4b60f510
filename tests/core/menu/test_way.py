"""From the first screen to a served answer, by keys alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.core.menu.conftest import works_of
from tests.core.menu.terminal import ENTER, Terminal

from mst import background, rundir
from mst.chat import Sampling
from mst.chat_remote import Remote, chosen_model, server_of
from mst.chat_terminal import printable
from mst.data.rows import Message
from mst.menu.serving import DEMO_QUESTION, address_of
from mst.menu.words import Words, words_of

MOST_KEYS = 12


def asked(address: str, question: str) -> str:
    """Return what the server answers, as the menu asks it; a random model babbles."""
    server = server_of(address)
    remote = Remote(server, chosen_model(server, None, None), Sampling())
    messages = [Message("system", "Name the customer's intent."), Message("user", question)]
    text = printable("".join(remote.answer(messages)))
    assert text
    return text


def came_back(place: Path, model: Path) -> None:
    """Leave the choice of a model as if it had been made before: the embedded one is slow."""
    (place / "state" / "mst").mkdir(parents=True)
    (place / "state" / "mst" / "menu.json").write_text(json.dumps({"model": str(model)}))


@pytest.mark.parametrize(("language", "locale"), [("en", "en_US.UTF-8"), ("zh", "zh_CN.UTF-8")])
def test_who_accepts_the_defaults_has_a_served_answer_after_twelve_keys(
    place: Path, tiny_model: Path, language: str, locale: str
) -> None:
    words = words_of(language)
    came_back(place, tiny_model)
    menu = Terminal(place, MST_MODELS=str(tiny_model.parent), LANG=locale)
    for question in ("home", "model", "data", "goal", "settings"):
        menu.sees(words(f"{question}.question"))
        menu.press(ENTER)
    menu.sees(words("plan.making")[:20])
    menu.child.send(ENTER)  # of somebody who grows impatient: it starts nothing
    menu.sees(words("plan.question"))
    menu.press("2", ENTER)  # a quick try
    menu.sees(words("outcome.done"))
    menu.sees(words("run.question"))
    menu.press(ENTER)
    menu.sees(words("serve.question"))
    menu.press(ENTER)
    menu.sees(words("serve.answer"))
    answer = menu.sees(words("serve.question")).replace("\r", "")

    assert menu.keys <= MOST_KEYS

    menu.press(ENTER)
    menu.sees(words("serve.stays"))
    menu.sees(words("run.question"))
    menu.child.sendeof()
    assert menu.ends() == 0

    works = background.works(works_of(place))
    assert [(each.arguments[0], each.state) for each in works] == [
        ("train", "done"),
        ("serve", "running"),
    ]
    address = address_of(works[1])
    assert address is not None
    assert asked(address, DEMO_QUESTION) in answer
    (run,) = (each for each in (place / "runs").iterdir() if each.is_dir())
    assert rundir.read_manifest(run).results["steps"] == 10
    for shown in ("menu", "plan --model", "train --model", "runs show", "serve", "chat --server"):
        assert f"$ mst {shown}" in menu.seen
    assert words("watch.means")[:20] in menu.seen
    if language == "en":  # once is enough
        check_what_follows(place, words)


def check_what_follows(place: Path, words: Words) -> None:
    """Stop the server and make the compliance pack, in another menu."""
    again = Terminal(place, "menu")
    again.sees(words("home.still_running"))
    again.press(ENTER)  # the server comes first
    again.sees(words("serve.what"))
    again.press("2", ENTER)
    again.sees(words("serve.stopping"))
    again.sees(words("home.question"))
    again.sees(words("home.runs"))
    number = again.seen.rpartition(words("home.runs"))[0].rstrip()[-2]
    again.press(number, ENTER)
    again.sees(words("runs.question"))
    again.press(ENTER)
    again.sees(words("run.question"))
    again.press("7", ENTER)
    again.sees("signed with the audit log's key")
    again.sees(words("run.question"))
    again.child.sendeof()

    assert "$ mst audit pack runs/" in again.seen
    assert again.ends() == 0
