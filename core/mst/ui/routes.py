"""The paths of the page's server: what each takes, and whether it changes anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field

from mst.serve.http.refusals import Refusal
from mst.serve.http.wire import Exchange
from mst.ui.choices import StartRequest
from mst.ui.page import ENTRANCE, FILES, PAGE

SESSION, LEAVE = "/api/session", "/api/leave"


class Token(BaseModel):
    """The token of a link."""

    model_config = ConfigDict(extra="forbid", strict=True)

    token: str = Field(max_length=200)


class Nothing(BaseModel):
    """A request that says all with its path."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Route:
    """A path that is matched, and what stood in it.

    Attributes:
        name: what a log may show: no id, and nothing that a caller made up.
        id: of a run, or the name of a work; "" where the path has none.
    """

    name: str
    id: str = ""


GETS = frozenset({"/api/runs", "/api/machine", "/api/audit", "/api/choices", "/api/works"})
POSTS: dict[str, type[BaseModel]] = {
    SESSION: Token,
    LEAVE: Nothing,
    "/api/start": StartRequest,
    "/api/audit/verify": Nothing,
    "/api/runs/{id}/stop": Nothing,
    "/api/runs/{id}/resume": Nothing,
}
_RUN = re.compile(r"/api/runs/([0-9a-f]{24})(|/live|/samples|/stop|/resume)")
_WORK = re.compile(r"/api/works/([A-Za-z0-9-]{1,100})")


def route_of(path: str) -> Route:
    """Return the route of a path, or one that is called "other"."""
    if path in (PAGE, ENTRANCE) or path in FILES or path in GETS or path in POSTS:
        return Route(path)
    found = _RUN.fullmatch(path)
    if found:
        return Route(f"/api/runs/{{id}}{found[2]}", found[1])
    found = _WORK.fullmatch(path)
    if found:
        return Route("/api/works/{name}", found[1])
    return Route("other")


def check_method(exchange: Exchange) -> None:
    """Refuse a path that isn't there, and a method that it doesn't have.

    Raises:
        Refusal: with what there is.
    """
    if exchange.route == "other":
        raise Refusal(404, "there is no such path here.", code="unknown_url")
    method = "POST" if exchange.route in POSTS else "GET"
    if exchange.method != method:
        raise Refusal(
            405, f"this path takes {method} alone.", code="method_not_allowed",
            headers={"Allow": method},
        )  # fmt: skip


def numbers(exchange: Exchange, most: dict[str, int], **defaults: int) -> dict[str, int]:
    """Return the whole numbers of a query, each between 0 and `most`; others are left out.

    Raises:
        Refusal: one is no number.
    """
    found = dict(defaults)
    for name, value in parse_qsl(exchange.query, max_num_fields=20):
        if name in most:
            if not value.isdecimal() or len(value) > 9:
                raise Refusal(400, f"{name} takes a whole number.", param=name)
            found[name] = min(int(value), most[name])
    return found


def text(exchange: Exchange, name: str) -> str:
    """Return a text of the query, at most 100 characters of it; "" for none."""
    return dict(parse_qsl(exchange.query, max_num_fields=20)).get(name, "")[:100]
