"""Nothing is lost: work goes on, and the menu finds it again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.core.menu.conftest import works_of
from tests.core.menu.scripted import scripted
from tests.core.menu.terminal import DOWN, ENTER, Terminal, environment

from mst import background
from mst.background import Work
from mst.menu.draft import Draft, load
from mst.menu.goal_step import choose_goal, choose_settings
from mst.menu.run_screen import state_now
from mst.menu.serving import address_of


def started(place: Path, fifo: Path) -> Work:
    """Return a work that waits for its options, at no cost."""
    return background.start(["plan", str(fifo)], place=works_of(place))


def now(work: Work) -> Work:
    found = background.read(work.directory)
    assert found is not None
    return found


def test_after_a_broken_connection_the_running_work_is_offered_first(
    place: Path, fifo: Path
) -> None:
    work = started(place, fifo)
    menu = Terminal(place, "menu")
    menu.sees("Work from before still runs")
    menu.press(ENTER)
    menu.sees("At work")
    menu.sees("goes on.  s:")
    menu.child.kill(signal.SIGHUP)
    menu.ends()

    assert now(work).state == "running"

    again = Terminal(place, "menu")
    again.sees("Work from before still runs")
    again.sees("running")
    again.press(ENTER)
    again.sees(f"$ mst plan {fifo}")
    again.sees("beginning")
    again.press(ENTER)
    again.sees("The work goes on")
    again.sees("What would you like to do?")
    again.child.sendeof()
    again.sees("In the background: 1.")

    assert again.ends() == 0
    assert now(work).state == "running"


def test_two_menus_show_the_same_work_and_either_stops_it(place: Path, fifo: Path) -> None:
    work = started(place, fifo)
    menus = [Terminal(place, "menu"), Terminal(place, "menu", "--plain")]
    menus[0].sees("Arrow keys")
    for each in menus:
        each.sees("Work from before still runs")
    menus[0].sees("8. Leave")
    menus[1].sees("Number, then Enter")
    for each in menus:
        each.press(ENTER)
        each.sees("At work")
        each.sees("beginning")
    menus[1].press("s", ENTER)
    for each in menus:
        each.sees("It was stopped.")
        each.child.close(force=True)

    assert now(work).state == "failed"


def test_ctrl_c_asks_and_leaves_and_staying_loses_nothing(place: Path) -> None:
    menu = Terminal(place, "menu")
    menu.sees("What would you like to do?")
    menu.child.sendintr()
    menu.sees("Leave the menu?")
    menu.press(DOWN, ENTER)
    menu.sees("What would you like to do?")
    menu.child.sendintr()
    menu.sees("Leave the menu?")
    menu.child.sendintr()
    menu.sees("Come back with: mst menu")

    assert menu.ends() == 0


def test_ctrl_c_while_work_is_watched_leaves_the_work_and_goes_on(place: Path, fifo: Path) -> None:
    work = started(place, fifo)
    menu = Terminal(place, "menu")
    menu.sees("Work from before still runs")
    menu.press(ENTER)
    menu.sees("beginning")
    menu.child.sendintr()
    menu.sees("The work goes on")
    menu.sees("What would you like to do?")
    menu.child.sendeof()

    assert menu.ends() == 0
    assert now(work).state == "running"


def test_a_server_is_found_however_many_requests_it_has_printed(place: Path) -> None:
    directory = place / "work"
    directory.mkdir()
    line = "serve  runs/a at http://127.0.0.1:8000/v1\n"
    (directory / "output").write_text(line + "POST /v1/chat/completions 200\n" * 9000)
    work = Work("work", ("serve", "runs/a"), directory, "", "running", None, None, place)

    assert address_of(work) == "http://127.0.0.1:8000/v1"


# As the menu gives it, and as the page does.
@pytest.mark.parametrize("output_dir", [("--output-dir", "runs/a"), ("--output-dir=runs/a",)])
def test_a_run_that_is_just_resumed_is_not_offered_to_be_resumed_again(
    place: Path, fifo: Path, monkeypatch: pytest.MonkeyPatch, output_dir: tuple[str, ...]
) -> None:
    run = place / "runs" / "a"
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    monkeypatch.setattr("mst.rundir.state_of", lambda path: "interrupted")

    assert state_now(run) == "interrupted"

    background.start(["train", str(fifo), *output_dir, "--resume"], cwd=place)

    assert state_now(run) == "running"


def test_a_step_back_keeps_what_was_chosen(place: Path) -> None:
    texts = Draft(dataset=("texts.txt",), shape="text", rows=3)
    session = scripted(place, texts, "style", "lora_rank", "32", "use", "back", "use")
    choose_goal(session)
    choose_settings(session)

    assert choose_settings(session) == "back"
    assert choose_settings(session) == "next"
    assert session.draft.goal == "style"
    assert session.draft.options == {"lora_rank": "32"}
    assert load(session.draft_file) == session.draft


def test_without_a_terminal_usage_is_printed_and_the_menu_refuses(place: Path) -> None:
    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mst", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment(place),
        )

    bare, menu = ran(), ran("menu")

    assert bare.returncode == 2
    assert bare.stdout.startswith("usage: mst COMMAND")
    assert menu.returncode == 2
    assert "needs a terminal" in menu.stderr


def test_the_first_screen_loads_nothing_heavy(place: Path) -> None:
    code = (
        "import sys; from mst.menu import home\n"
        "from tests.core.menu.scripted import scripted; from pathlib import Path\n"
        "import prompt_toolkit.shortcuts.choice_input\n"
        "session = scripted(Path(sys.argv[1]), None, 'back')\n"
        "assert not home.home(session)\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'cattrs', 'pydantic', 'pytest'}\n"
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        env={**environment(place), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    # Half a second on a quiet machine (docs/menu.md); tests share theirs.
    assert time.monotonic() - began < 5
