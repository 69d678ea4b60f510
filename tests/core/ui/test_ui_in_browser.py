"""The page of `mst ui` in a real browser: Chromium, by clicks and keys, on two sizes of screen.

It needs `playwright` and a Chromium of the system (`apt-get install chromium`), which the extra
`dev` does not bring; the check of accessibility also `npm ci` in this directory. Without them these
tests are skipped, and those of `test_page_routes` and `test_ui_command` cover all but the clicks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import blank_page, browser, skip_without
from tests.core.ui.test_ui_command import Ui, started, stop_works, until

from mst import rundir
from mst.ui.index import id_of

pytestmark = pytest.mark.slow
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
PARTS = ("#/", "#/run/{id}", "#/start", "#/machine")


@pytest.fixture(scope="module")
def ui(
    finished_run: Path, tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ui]:
    skip_without()
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(finished_run, home / "runs" / "first")
    row = {"reference": "<b>yes</b>", "prediction": "<img src=x onerror=alert(1)>"}
    (home / "runs" / "first" / "answers.jsonl").write_text(json.dumps(row) + "\n")
    made = started(
        home, home / "runs", "--models", tiny_model.parent, "--data", chat_rows.parent,
        "--samples", "on",
    )  # fmt: skip
    yield made
    made.end()
    stop_works(home)


@pytest.fixture(scope="module")
def chromium(ui: Ui) -> Iterator[Any]:
    with browser() as found:
        yield found


def opened(ui: Ui, chromium: Any, language: str, size: dict[str, int]) -> tuple[Any, list[str]]:
    """Return the page, entered by its link, and a list of what it asks and complains of."""
    page, told = blank_page(chromium, size, language)
    before = len(ui.links())
    page.goto(ui.links()[-1])
    page.locator("table.runs tbody tr").first.wait_for()
    until(lambda: len(ui.links()) > before)
    return page, told


def test_the_link_leads_in_once_and_leaves_no_trace(ui: Ui, chromium: Any) -> None:
    link = ui.links()[-1]
    page, told = opened(ui, chromium, "en-GB", DESKTOP)
    kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    other = chromium.new_context(locale="zh-CN").new_page()
    other.goto(link)
    other.get_by_text("这个链接已失效").wait_for()
    page.go_back()

    assert link.partition("#")[2] not in page.url
    assert kept == [0, 0, ""]
    complaints = [each for each in told if each.startswith(("error", "warning"))]
    assert complaints == []
    asked = [each for each in told if "://" in each.split(" ")[0]]
    assert {each.split("/")[2] for each in asked} == {f"127.0.0.1:{ui.port}"}
    assert not any(link.partition("#")[2] in each for each in asked[1:])


@pytest.mark.parametrize(("language", "stop"), [("en-GB", "Stop"), ("zh-CN", "停止")])
def test_a_run_is_started_and_stopped_by_clicks(
    ui: Ui, chromium: Any, language: str, stop: str
) -> None:
    page, told = opened(ui, chromium, language, PHONE if language == "zh-CN" else DESKTOP)
    name = f"clicked-{language}"
    page.locator("#to-start").click()
    page.locator("#run").fill(name)
    page.locator("#model").select_option(index=1)
    page.locator("input[name=dataset]").first.check()
    page.locator("#option-learning_rate").fill("0.001")
    page.locator("#option-max_steps").fill("1000000")
    page.locator("#option-device").fill("cpu")
    page.locator("form.start > details summary").last.click()
    for option, value in (("val_size", "0"), ("threads", "1"), ("per_device_train_batch_size", "4"),
                          ("gradient_accumulation_steps", "1")):  # fmt: skip
        page.locator(f"#option-{option}").fill(value)
    for option in ("label_accuracy", "torch_compile"):
        page.locator(f"#option-{option}").select_option("off")
    page.locator("#begin").click()
    page.locator("pre").filter(has_text="run ").wait_for(timeout=60_000)
    page.goto(f"http://127.0.0.1:{ui.port}/#/run/{id_of(ui.runs / name)}")
    page.locator("figure canvas").first.wait_for(timeout=60_000)
    box = page.locator(".chart").first
    before = box.get_attribute("aria-label")
    page.wait_for_function(
        "text => document.querySelector('.chart').ariaLabel !== text", arg=before
    )
    button = page.get_by_role("button", name=stop)
    button.click()
    page.locator("p.actions button").click()
    page.locator("p.status .interrupted").wait_for(timeout=60_000)

    assert rundir.state_of(ui.runs / name) == "interrupted"
    # Resuming is offered, and asks once more.
    page.locator("p.actions button").click()
    assert page.locator("p.actions button").inner_text() in ("Really resume?", "确定继续吗？")
    assert [each for each in told if each.startswith(("error", "warning"))] == []


def test_curves_are_read_by_keyboard_and_as_a_table(ui: Ui, chromium: Any) -> None:
    page, _ = opened(ui, chromium, "en-GB", DESKTOP)
    page.locator("table.runs a", has_text="first").click()
    page.locator("figure canvas").first.wait_for()
    chart = page.locator(".chart").first
    label = chart.get_attribute("aria-label")
    chart.focus()
    page.keyboard.press("Home")
    first = page.locator("figure output").first.inner_text()
    page.keyboard.press("ArrowRight")
    second = page.locator("figure output").first.inner_text()
    page.locator("figure summary").first.click()
    rows = page.locator("figure table").first.locator("tbody tr")
    rows.first.wait_for()
    metrics = rundir.read_metrics(ui.runs / "first")

    assert "Training loss: newest" in label
    assert first.startswith(f"step 1: Training loss {metrics[0]['loss']:.4g}")
    assert second.startswith("step 2:")
    assert "Held-out loss" in second
    assert rows.count() == 4


def test_a_finished_run_says_what_next_and_its_figures_have_names_and_units(
    ui: Ui, chromium: Any
) -> None:
    page, told = opened(ui, chromium, "zh-CN", DESKTOP)
    page.goto(f"http://127.0.0.1:{ui.port}/#/run/{id_of(ui.runs / 'first')}")
    page.get_by_text(f"mst serve {ui.runs / 'first'}").wait_for()
    results = page.locator("table").filter(has_text="内存峰值").inner_text()

    assert page.get_by_text("接下来，在终端中").is_visible()
    assert re.search(r"内存峰值\s+[\d.]+\sGiB", results)
    assert re.search(r"训练用时\s+[\d.]+\ss", results)
    assert "peak_memory_bytes" not in results
    assert page.get_by_text("mst export RUN").count() == 0
    assert page.get_by_text(f"mst export {ui.runs / 'first'}").count() == 1
    assert [each for each in told if each.startswith(("error", "warning"))] == []


def test_a_text_of_the_data_is_shown_as_text(ui: Ui, chromium: Any) -> None:
    page, told = opened(ui, chromium, "en-GB", DESKTOP)
    page.goto(f"http://127.0.0.1:{ui.port}/#/run/{id_of(ui.runs / 'first')}")
    page.get_by_text("<img src=x onerror=alert(1)>").wait_for()

    assert page.locator("#main img").count() == 0
    assert [each for each in told if each.startswith(("error", "warning"))] == []


def test_a_run_whose_files_vanish_while_it_is_shown_is_told(ui: Ui, chromium: Any) -> None:
    shutil.copytree(ui.runs / "first", ui.runs / "vanishing")
    page, _ = opened(ui, chromium, "en-GB", DESKTOP)
    page.goto(f"http://127.0.0.1:{ui.port}/#/run/{id_of(ui.runs / 'vanishing')}")
    page.locator("figure canvas").first.wait_for()
    shutil.rmtree(ui.runs / "vanishing")
    page.get_by_text("This run is not there.").wait_for(timeout=20_000)

    assert page.locator("p.status .gone").count() == 1
    assert page.locator("figure canvas").first.is_visible()


def test_a_page_that_nobody_looks_at_holds_no_connection(ui: Ui, chromium: Any) -> None:
    page, _ = opened(ui, chromium, "en-GB", DESKTOP)
    page.goto(f"http://127.0.0.1:{ui.port}/#/run/{id_of(ui.runs / 'first')}")
    page.locator("figure canvas").first.wait_for()
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with page.expect_event("requestfailed", lambda each: each.url.endswith("/live")) as left:
        page.evaluate(hide, True)
    with page.expect_event("request", lambda each: each.url.endswith("/live")) as asked:
        page.evaluate(hide, False)

    assert left.value.url == asked.value.url


def test_a_link_keeps_the_keyboard_when_the_list_is_made_anew(ui: Ui, chromium: Any) -> None:
    shutil.copytree(ui.runs / "first", ui.runs / "focused")
    page, _ = opened(ui, chromium, "en-GB", DESKTOP)
    page.locator("table.runs a", has_text="focused").focus()
    page.evaluate("document.activeElement.dataset.old = 'yes'")
    with (ui.runs / "focused" / rundir.METRICS).open("a") as file:
        file.write('{"step": 5, "loss": 0.5}\n')
    page.wait_for_function("() => !document.querySelector('[data-old]')", timeout=20_000)

    assert page.evaluate("document.activeElement.textContent") == "focused"


@pytest.mark.parametrize("language", ["en-GB", "zh-CN"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_part_fits_the_screen_and_axe_finds_no_serious_fault(
    ui: Ui, chromium: Any, language: str, size: dict[str, int]
) -> None:
    page, _ = opened(ui, chromium, language, size)
    faults: list[str] = []
    for part in PARTS:
        page.goto(f"http://127.0.0.1:{ui.port}/{part.format(id=id_of(ui.runs / 'first'))}")
        page.locator("#main h2, table.runs tbody tr").last.wait_for()
        if "run" in part:
            page.locator("figure canvas").first.wait_for()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], part
        if AXE.is_file():
            faults += [f"{part}: {each}" for each in axe_faults(page)]
    if not AXE.is_file():
        pytest.skip("the screens fit; axe wants `npm ci` in tests/core/ui")

    assert faults == []


def axe_faults(page: Any) -> list[str]:
    """Return what axe-core finds serious or critical."""
    # Not as a script of the page, which its policy would refuse.
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{each['id']} ({each['impact']}): {each['nodes'][0]['html'][:200]}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
