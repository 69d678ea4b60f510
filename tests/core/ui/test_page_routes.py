"""The page's server, every path of it: who may ask, and what is answered."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.ui.conftest import HOST, Page, path_of

from mst import rundir
from mst.seal.audit import open_log, record
from mst.ui import index as index_module
from mst.ui import live
from mst.ui.page import FILES
from mst.ui.routes import GETS, POSTS
from mst.ui.sessions import Sessions

OUT = ("/api/runs/{id}", "/api/runs/{id}/live", "/api/runs/{id}/samples")


def test_a_link_works_once_and_the_next_is_shown(opened: Callable[..., Page]) -> None:
    page = opened()
    first = page.links[0]
    page.enter()
    again = page.post("/api/session", {"token": first})

    assert page.get("/api/runs").status == 200
    assert again.status == 403
    assert "Set-Cookie".lower() not in again.headers
    assert again.json["error"]["code"] == "link_used"
    assert len(page.links) == 2
    assert len(set(page.links)) == 2
    assert first not in again.text


def test_the_session_is_a_cookie_that_scripts_and_other_sites_do_not_get(
    opened: Callable[..., Page],
) -> None:
    page = opened()
    given = page.post("/api/session", {"token": page.links[0]}).headers["set-cookie"]

    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(given.split("; "))
    assert page.links[0] not in given


@pytest.mark.parametrize("cookie", ["", "mst-ui-8123=", "mst-ui-8123=stolen", "a=b; ;;=", "é=1"])
def test_without_a_session_nothing_is_shown_but_how_to_get_in(
    opened: Callable[..., Page], runs: Path, cookie: str
) -> None:
    page = opened()
    page.cookie = cookie
    paths = [*GETS, *(path_of(runs / "first") + each.removeprefix(OUT[0]) for each in OUT)]

    assert {page.get(each).status for each in paths} == {401}
    posts = [each.replace("/api/runs/{id}", path_of(runs / "first")) for each in POSTS]
    assert {page.post(each, {}).status for each in posts if each != "/api/session"} == {401}
    whole = page.get("/")
    assert whole.status == 401
    assert "mst ui" in whole.text
    assert str(runs) not in whole.text
    assert page.get("/enter").status == 200


def test_other_sites_and_other_names_are_refused(page: Page) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"host": "evil.example"}, "/api/runs"),
        ({"host": f"evil.example@{HOST}"}, "/"),
        ({"origin": "http://evil.example"}, "/api/runs"),
        ({"origin": "http://127.0.0.1:9999"}, "/api/runs"),
        ({"sec-fetch-site": "cross-site"}, "/api/runs"),
        # Another port of this machine is the same site to a browser, which sends the cookie along.
        ({"sec-fetch-site": "same-site"}, "/api/machine"),
    ]

    assert [page.get(path, **headers).status for headers, path in cases] == [403] * len(cases)
    assert page.post("/api/audit/verify", {}, origin="http://127.0.0.1:9999").status == 403
    assert page.post("/api/audit/verify", {}, origin="").status == 403
    assert page.post("/api/audit/verify", b"{}", **{"content-type": "text/plain"}).status == 415


def test_leaving_ends_the_session(page: Page) -> None:
    assert page.post("/api/leave", {}).status == 200
    assert page.get("/api/runs").status == 401


def test_a_session_ends_by_itself_and_takes_its_streams_along(
    page: Page, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_LOOK_SECONDS", 0.05)
    reply = page.get(f"{path_of(runs / 'first')}/live",
                     meanwhile=lambda: page.app._sessions.leave(page.cookie))  # fmt: skip

    assert len(reply.events) == 1
    assert page.get("/api/runs").status == 401
    hours = [0.0]
    links: list[str] = []
    sessions = Sessions(1, links.append, lambda: 3600 * hours[0])
    used, left = ((sessions.enter(links[-1]) or "").partition(";")[0] for _ in range(2))
    inside = []
    for number in range(1, 15):  # every 54 minutes
        hours[0] = 0.9 * number
        inside.append(sessions.is_inside(used))

    # Twelve hours are the most, however it is used.
    assert inside == [True] * 13 + [False]
    assert not sessions.is_inside(left)
    hours[0] = 0.0
    again = (sessions.enter(links[-1]) or "").partition(";")[0]
    hours[0] = 1.0
    assert not sessions.is_inside(again)


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script_of_a_text(page: Page) -> None:
    whole = {path: page.get(path) for path in ["/", "/enter", *FILES]}
    policy = dict(
        each.split(" ", 1) for each in whole["/"].headers["content-security-policy"].split("; ")
    )

    assert {each.status for each in whole.values()} == {200}
    for each in whole.values():
        assert each.headers["x-content-type-options"] == "nosniff"
        assert each.headers["x-frame-options"] == "DENY"
        assert each.headers["referrer-policy"] == "no-referrer"
        assert (
            each.headers["content-security-policy"] == whole["/"].headers["content-security-policy"]
        )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    own = {path: each for path, each in whole.items() if "uplot" not in path}
    text = "".join(re.sub("^ *//.*", "", each.text, flags=re.M) for each in own.values())
    assert not re.search("https?://", text)
    assert not re.search(r"innerHTML|localStorage|sessionStorage|indexedDB|document\.cookie|eval\(",
                         text)  # fmt: skip
    for path in ("/", "/enter"):
        assert set(re.findall('(?:src|href)="(/[^"?]*)"', whole[path].text)) <= set(FILES)
        assert not re.search(r"<style|style=| on[a-z]+=|javascript:", whole[path].text)
        assert "{{" not in whole[path].text


def test_what_the_scripts_import_is_served(page: Page) -> None:
    for path in FILES:
        if path.endswith(".js") and "uplot" not in path:
            wanted = re.findall(r'from "\.(/[^"]+)"', page.get(path).text)
            assert set(wanted) <= set(FILES), path


def test_the_language_is_the_commands_or_the_browsers_or_the_addresss(
    opened: Callable[..., Page],
) -> None:
    page, fixed = opened().enter(), opened(language="zh").enter()
    browser: dict[str, Any] = {"accept-language": "zh-TW,en;q=0.5"}

    assert '<html lang="en">' in page.get("/").text
    assert '<html lang="zh-CN">' in page.get("/", **browser).text
    assert '<html lang="zh-CN">' in fixed.get("/").text
    assert '<html lang="en">' in fixed.get("/?lang=en").text
    assert '<html lang="zh-CN">' in fixed.get('/?lang="><script>').text
    chinese, english = fixed.get("/").text, page.get("/").text
    assert re.findall("<[a-z]+", chinese) == re.findall("<[a-z]+", english)


def test_the_list_is_paged_and_searched(page: Page, runs: Path) -> None:
    whole = page.get("/api/runs").json
    second = page.get("/api/runs?offset=1&limit=1").json

    assert (whole["all"], whole["matching"]) == (4, 4)
    assert [each["name"] for each in whole["runs"]] == ["killed", "second", "first", "torn"]
    assert [each["name"] for each in second["runs"]] == ["second"]
    assert whole["states"] == {"killed": 1, "done": 2, "damaged": 1}
    assert [each["name"] for each in page.get("/api/runs?find=FIR").json["runs"]] == ["first"]
    assert [each["name"] for each in page.get("/api/runs?state=killed").json["runs"]] == ["killed"]
    assert page.get("/api/runs?find=nothing").json["runs"] == []
    assert page.get("/api/runs?offset=-1").status == 400
    assert page.get("/api/runs?limit=x").status == 400


def test_a_run_is_told_with_its_plan_and_reasons(page: Page, runs: Path) -> None:
    found = page.get(path_of(runs / "first")).json
    stored = json.loads((runs / "first" / "plan.json").read_text())

    assert found["problems"] == []
    assert found["plan"]["reasons"] == stored["reasons"]
    assert found["plan"]["peak_bytes"] == sum(found["plan"]["memory"].values())
    assert [each["name"] for each in found["evaluation"]] == ["best_eval_loss", "last_eval_loss"]
    assert found["seal"]["open"] == []
    assert found["data"][0]["rows"] == 40
    assert found["exports"] == []


def test_curves_have_loss_rate_speed_and_memory(
    page: Page, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curves() -> Any:
        chunk = page.get(f"{path_of(runs / 'first')}/live", events=1).chunks[0]
        return json.loads(chunk.removeprefix(b"data: "))["points"]

    points = curves()
    monkeypatch.setattr(live, "POINTS", 4)
    few = curves()

    assert {"loss", "learning_rate", "tokens_per_second", "memory_bytes", "eval_loss"} <= set(
        points
    )
    assert points["loss"][0] == [1, 2, 3, 4]
    assert points["eval_loss"][0] == [2, 4]
    assert all(each > 1 << 20 for each in points["memory_bytes"][1])
    assert all(len(each[0]) <= 4 for each in few.values())


def test_figures_that_are_no_numbers_leave_json_whole(page: Page, runs: Path) -> None:
    bad = {"last_eval_loss": math.nan, "steps": math.inf, "accuracy_after_free": math.nan}
    rundir.update_manifest(runs / "second", results=bad)
    (runs / "second" / rundir.METRICS).unlink()
    replies = [page.get(each) for each in ("/api/runs", path_of(runs / "second"))]

    assert [each.status for each in replies] == [200, 200]
    assert not any(re.search("NaN|Infinity", each.text) for each in replies)
    assert replies[1].json["results"] == dict.fromkeys(bad)


def test_a_damaged_run_is_shown_for_what_it_is(page: Page, runs: Path) -> None:
    for name in ("plan.json", "seal.json"):
        (runs / "first" / name).write_text("[" * 100_000)
    found, torn = page.get(path_of(runs / "first")).json, page.get(path_of(runs / "torn")).json

    assert "damaged" in found["problems"][0]
    assert "plan" not in found
    assert found["seal"] is None
    assert found["evaluation"]
    assert (torn["state"], torn["plan"]["tuner"]) == ("damaged", "lora")


def test_a_run_that_vanishes_is_told(
    page: Page, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_LOOK_SECONDS", 0.05)
    path = path_of(runs / "first")
    reply = page.get(f"{path}/live", meanwhile=lambda: shutil.rmtree(runs / "first"))

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert [set(each) for each in reply.events][1:] == [{"gone"}]
    assert page.get(path).status == 404
    assert page.get(f"{path}/live").json["error"]["code"] == "run_not_found"


def test_what_comes_to_a_curve_is_sent_alone(
    page: Page, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(index_module, "_FRESH_SECONDS", 0.0)

    def grow() -> None:
        with (runs / "second" / rundir.METRICS).open("a") as file:
            file.write('{"step": 5, "loss": 0.5}\n')

    reply = page.get(f"{path_of(runs / 'second')}/live", events=2, meanwhile=grow)
    first, second = (json.loads(each.removeprefix(b"data: ")) for each in reply.chunks)

    assert (first["whole"], second["whole"]) == (True, False)
    assert len(first["points"]["loss"][0]) == 4
    assert second["points"] == {"loss": [[5], [0.5]]}
    assert second["run"]["steps"] == 5


def test_exports_and_evaluations_are_shown_with_their_figures(page: Page, runs: Path) -> None:
    artefact = runs / "first" / "export" / "gptq"
    artefact.mkdir(parents=True)
    manifest = {
        "format": "gptq", "status": "failed", "scheme": "4 bits", "faults": ["too far"],
        "judged_from": "of the run", "quality": {"model": {"mean_kl": 0.5, "perplexity": 1e400}},
        "bounds": {"mean_kl": 0.1}, "not_checked": {"speed": "no GPU"}, "created": "2026-01-01",
    }  # fmt: skip
    (artefact / "manifest.json").write_text(json.dumps(manifest))
    (runs / "first" / "notes.json").write_text('{"not": "a report"}')
    reply = page.get(path_of(runs / "first"))
    found = reply.json["exports"]

    assert (found[0]["format"], found[0]["status"], found[0]["faults"]) == (
        "gptq", "failed", ["too far"],
    )  # fmt: skip
    # JSON has no infinity, and a browser would take none of the answer.
    assert found[0]["model"] == {"mean_kl": 0.5, "perplexity": None}
    assert found[0]["bounds"] == {"mean_kl": 0.1}
    assert reply.json["reports"] == []
    assert "Infinity" not in reply.text


def test_sample_answers_are_shown_only_where_they_are_switched_on(
    opened: Callable[..., Page], runs: Path
) -> None:
    row = {"file": "x", "row": 1, "reference": "yes", "prediction": "y" * 5000}
    (runs / "first" / "answers.jsonl").write_text(json.dumps(row) + "\n")
    path = f"{path_of(runs / 'first')}/samples"
    off, on = opened().enter(), opened(samples=True).enter()

    assert off.get(path).json["error"]["code"] == "samples_off"
    assert "yyy" not in off.get(path_of(runs / "first")).text
    found = on.get(path).json["files"]
    assert [each["file"] for each in found] == ["answers.jsonl"]
    assert len(found[0]["rows"][0]["prediction"]) == 2000


def test_the_devices_are_told_with_their_health(page: Page) -> None:
    found = page.get("/api/machine").json
    cpu = next(each for each in found["backends"] if each["name"] == "cpu")

    assert cpu["usable"]
    assert cpu["devices"][0]["memory_total_bytes"] > 1 << 28
    assert found["host"]["memory_free_bytes"] > 0


def test_the_audit_log_is_told_and_checked(page: Page, tmp_path: Path) -> None:
    before = page.get("/api/audit").json, page.post("/api/audit/verify", {}).json
    with open_log(tmp_path / "audit", "test"):
        record("test.done", number=1)
    state, whole = page.get("/api/audit").json, page.post("/api/audit/verify", {}).json
    segment = tmp_path / "audit" / "000001.jsonl"
    segment.write_text(segment.read_text().replace('"number":1', '"number":2'))
    changed = page.post("/api/audit/verify", {}).json

    assert (before[0]["files"], before[1]["whole"]) == (0, None)
    assert (state["files"], state["problem"]) == (1, None)
    assert state["last_time"].startswith("20")
    assert whole["whole"] is True
    assert whole["events"] >= 3
    assert changed["whole"] is False
    assert changed["problems"]


@pytest.mark.parametrize(
    "path",
    ["/api/runs/..%2f..%2fetc%2fpasswd", "/api/runs/../../etc/passwd", "/words.json", "/../job.py",
     "/uplot/../page.js", "/api/runs/" + "0" * 23, "//etc/passwd", "/api/runs/{id}",
     "/api/works/../x", "/favicon.ico", "/web/page.js", "/API/RUNS"],
)  # fmt: skip
def test_no_path_leads_anywhere_else(page: Page, path: str) -> None:
    assert page.get(path).status == 404


def test_methods_and_bodies_that_do_not_fit_are_refused(page: Page, runs: Path) -> None:
    assert page.get("/api/start").status == 405
    assert page.post("/api/runs", {}).status == 405
    assert page.post("/api/session", {"token": 3}).status == 400
    assert page.post("/api/session", {"token": "x", "more": 1}).status == 400
    assert page.post("/api/start", b"{").status == 400
    assert page.post("/api/start", b" " * 70_000).status == 413
    # There is no process that starts runs here, as with --actions off.
    assert page.post("/api/start", {"name": "x"}).json["error"]["code"] == "actions_off"
    stop = page.post(f"{path_of(runs / 'first')}/stop", {})
    assert stop.json["error"]["code"] == "actions_off"


def test_two_pages_at_once_do_not_disturb_each_other(opened: Callable[..., Page]) -> None:
    one = opened().enter()
    other = Page(one.app, one.links).enter()
    one.post("/api/leave", {})

    assert other.get("/api/runs").status == 200
    assert one.get("/api/runs").status == 401


def test_only_so_many_browsers_are_in_at_once() -> None:
    links: list[str] = []
    sessions = Sessions(1, links.append)
    cookies = [sessions.enter(links[-1]) or "" for _ in range(40)]

    inside = [sessions.is_inside(each.partition(";")[0]) for each in cookies]
    assert inside == [False] * 8 + [True] * 32
    assert not sessions.is_inside(f"{sessions.cookie}=")
