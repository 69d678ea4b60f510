"""The page's server as an ASGI application: who may look, what is asked, and what is answered."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from mst.errors import MstError
from mst.figure_names import shares
from mst.seal.redaction import bug_report
from mst.serve.http.access import Names, check_names
from mst.serve.http.page import language_of
from mst.serve.http.refusals import Refusal, of_validation
from mst.serve.http.wire import (
    Exchange,
    Gone,
    Receive,
    Send,
    answer_json,
    exchange_of,
    read_body,
    until_gone,
)
from mst.ui import routes
from mst.ui.asking import ActionRefused, Outside
from mst.ui.choices import StartRequest
from mst.ui.detail import detail
from mst.ui.index import Entry, Index
from mst.ui.job import UiJob
from mst.ui.live import follow
from mst.ui.machine import Machine, audit_state, audit_verified
from mst.ui.page import ENTRANCE, FILES, PAGE, answer_file, answer_page
from mst.ui.reading import choices, listed, samples_of, work_of, works
from mst.ui.sessions import Sessions
from mst.ui.speaking import spoken
from mst.ui.tails import Tails

_BODY_BYTES, _BODY_SECONDS = 1 << 16, 10.0
# Requests that are answered at once, streams that stay open among them.
_MOST_REQUESTS = 64
_OUT = (
    "this page is for whoever has its link. `mst ui` shows one in the terminal where it runs; each"
    " link works once, and a new one follows it there."
)


@dataclass
class State:
    """Whether the server has been told to end."""

    stopping: bool = False


class Noted(Protocol):
    """Takes an event for the audit log: what was done, and the name of a run."""

    def __call__(self, event: str, **facts: str) -> None:
        """Note it."""


def _unnoted(event: str, **facts: str) -> None:
    pass


class App:
    """Answers the page. What it is asked and answers is neither kept nor logged."""

    def __init__(
        self, job: UiJob, sessions: Sessions, outside: Outside | None, noted: Noted = _unnoted
    ) -> None:
        """Answer for a job.

        Args:
            job: what is shown.
            sessions: who may look.
            outside: starts and stops runs; None where that is switched off.
            noted: is told what is to stand in the audit log.
        """
        self.service = State()
        self.index = Index([Path(each) for each in job.places.runs])
        self.tails, self.machine = Tails(), Machine()
        self._job, self._sessions, self._outside, self._noted = job, sessions, outside, noted
        self._names = Names()
        self._in_flight = 0

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI calls it."""
        if scope["type"] != "http":  # neither websockets nor a lifespan
            raise NotImplementedError(scope["type"])
        exchange = exchange_of(scope, receive, send)
        route = routes.route_of(exchange.path)
        exchange.route = route.name
        try:
            await self._checked(exchange, route.id)
        except Gone:
            return
        except Exception as error:
            await _refuse(exchange, _refusal_of(error))

    async def _checked(self, exchange: Exchange, name: str) -> None:
        check_names(self._names, exchange)
        routes.check_method(exchange)
        cookies = exchange.headers.get("cookie", "")
        if exchange.route in FILES:
            return await answer_file(exchange)
        if exchange.route in (PAGE, ENTRANCE):
            inside = self._sessions.is_inside(cookies)
            return await answer_page(exchange, self._job.language, self._settings(), inside)
        _check_site(exchange)
        if exchange.route == routes.SESSION:
            return await self._enter(exchange)
        if not self._sessions.is_inside(cookies):
            raise Refusal(401, _OUT, code="no_session")
        if self._in_flight >= _MOST_REQUESTS:
            raise Refusal(429, "too many requests at once.", code="overloaded")
        self._in_flight += 1
        try:
            if exchange.method == "POST":
                await self._post(exchange, name, cookies)
            else:
                await self._get(exchange, name, cookies)
        finally:
            self._in_flight -= 1

    def _settings(self) -> dict[str, Any]:
        job = self._job
        return {
            "samples": job.samples,
            "actions": job.actions,
            "places": len(job.places.runs),
            "shares": sorted(shares()),
        }

    async def _enter(self, exchange: Exchange) -> None:
        asked = await _body(exchange, routes.Token)
        assert isinstance(asked, routes.Token)
        cookie = self._sessions.enter(asked.token)
        if cookie is None:
            raise Refusal(
                403,
                "this link is not good: it was used before, or mst ui was started anew since. A new"
                " one stands in the terminal where mst ui runs.",
                code="link_used",
            )
        self._noted("ui.entered")
        await answer_json(exchange, {"entered": True}, headers={"Set-Cookie": cookie})

    async def _get(self, exchange: Exchange, name: str, cookies: str) -> None:
        if exchange.route == "/api/runs/{id}/live":
            entry = await self._run(name)
            inside = partial(self._sessions.is_inside, cookies)
            return await until_gone(exchange, follow(exchange, self, entry, inside))
        await answer_json(exchange, spoken(await self._read(exchange, name), _language(exchange)))

    async def _read(self, exchange: Exchange, name: str) -> Any:
        """Return what a path shows; files are read in a thread, so that nobody waits for a disk."""
        job = self._job
        if exchange.route == "/api/runs":
            return await asyncio.to_thread(listed, self.index, exchange)
        if exchange.route == "/api/machine":
            return await asyncio.to_thread(self.machine.state)
        if exchange.route == "/api/audit":
            return await asyncio.to_thread(audit_state, Path(job.audit))
        if exchange.route == "/api/choices":
            return await asyncio.to_thread(choices, job.places)
        if exchange.route == "/api/works":
            return await asyncio.to_thread(works, self.index)
        if exchange.route == "/api/works/{name}":
            return await asyncio.to_thread(work_of, name, self.index)
        entry = await self._run(name)
        if exchange.route == "/api/runs/{id}/samples":
            return await asyncio.to_thread(samples_of, entry, job.samples)
        return await asyncio.to_thread(detail, entry)

    async def _post(self, exchange: Exchange, name: str, cookies: str) -> None:
        asked = await _body(exchange, routes.POSTS[exchange.route])
        if exchange.route == routes.LEAVE:
            cookie = self._sessions.leave(cookies)
            return await answer_json(exchange, {"entered": False}, headers={"Set-Cookie": cookie})
        if exchange.route == "/api/audit/verify":
            found = await asyncio.to_thread(audit_verified, Path(self._job.audit))
            return await answer_json(exchange, found)
        if self._outside is None:
            raise Refusal(
                403, "this page only shows runs: it was started with --actions off.",
                code="actions_off",
            )  # fmt: skip
        if isinstance(asked, StartRequest):
            do, known = "start", asked.name
            found = await self._outside.ask(do, request=asked.model_dump())
        else:
            do, run = exchange.route.rpartition("/")[2], await self._run(name)
            known = run.summary.name
            found = await self._outside.ask(do, run=run.id)
        self._noted("ui.asked", do=do, run=known)
        await answer_json(exchange, found)

    async def _run(self, name: str) -> Entry:
        found = await asyncio.to_thread(self.index.find, name)
        if found is None:
            raise Refusal(
                404, "this run is not there any more, or never was.", code="run_not_found"
            )
        return found


def _language(exchange: Exchange) -> str:
    """Return the language of the page that asks, which its scripts send along."""
    return language_of(exchange.headers.get("accept-language", ""))


def _check_site(exchange: Exchange) -> None:
    """Refuse what another page of this machine asks; `check_names` has looked at its Origin.

    Browsers say for themselves from where a request comes, and a page can't change it. One on
    another port of this machine is of the same site to them, so that they send the cookie along.

    Raises:
        Refusal: it comes from elsewhere.
    """
    site = exchange.headers.get("sec-fetch-site", "same-origin")
    if site not in ("same-origin", "none"):
        raise Refusal(403, "pages of other sites may not ask this.", code="origin_not_allowed")
    if exchange.method == "POST" and "origin" not in exchange.headers:
        raise Refusal(403, "this is for the page alone: no Origin.", code="origin_not_allowed")


async def _body(exchange: Exchange, kind: type[BaseModel]) -> BaseModel:
    try:
        raw = await read_body(exchange, _BODY_BYTES, _BODY_SECONDS)
    except Refusal as refusal:
        if refusal.status == 413:
            raise Refusal(413, f"a request has {_BODY_BYTES} bytes at most here.") from None
        raise
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise of_validation(error) from None


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ActionRefused):
        return Refusal(409, str(error), code="action_refused")
    if isinstance(error, MstError):
        return Refusal(400, str(error))
    sys.stderr.write(bug_report(error))
    return Refusal(
        500, "this is a bug in mst; its place is in the terminal where mst ui runs.",
        "server_error", "internal_error",
    )  # fmt: skip


async def _refuse(exchange: Exchange, refusal: Refusal) -> None:
    if exchange.events is not None and exchange.events.begun:
        await exchange.events.fail(refusal)
    elif exchange.status == 0:
        body = spoken(refusal.body(), _language(exchange))
        await answer_json(exchange, body, refusal.status, refusal.headers)
