"""The kit as plain pytest: `MST_BACKEND=NAME pytest --pyargs mst.conformance`, one test a check.

A variable and not an option: pytest reads the command line before it has found this package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mst.conformance.checks import CHECKS, Check
from mst.conformance.findings import FAIL, SKIP, Result
from mst.conformance.runner import find_subject, run_checks
from mst.errors import MstError


@pytest.fixture(scope="session")
def result_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Check], Result]:
    """Return a function that runs the selected checks up to one, and returns its result."""
    name = os.environ.get("MST_BACKEND")
    if not name:
        pytest.fail("no backend is named: set MST_BACKEND=NAME", pytrace=False)
    # `-k` and the like leave out checks; those are not run.
    wanted = {
        each.callspec.id
        for each in request.session.items
        if isinstance(each, pytest.Function) and hasattr(each, "callspec")
    }
    checks = [check for check in CHECKS if check.id in wanted]
    workspace = tmp_path_factory.mktemp("mst-conformance")
    running = _results(checks, name, workspace)
    known: dict[str, Result] = {}

    def result(check: Check) -> Result:
        while check.id not in known:
            found = next(running)
            known[found.id] = found
        return known[check.id]

    return result


def _results(checks: list[Check], name: str, workspace: Path) -> Iterator[Result]:
    try:
        subject = find_subject(name, workspace)
    except MstError as error:
        pytest.fail(str(error), pytrace=False)
    yield from run_checks(checks, subject, workspace)


@pytest.mark.parametrize("check", CHECKS, ids=[check.id for check in CHECKS])
def test_promise(check: Check, result_of: Callable[[Check], Result]) -> None:
    """Pass, fail or skip as the check does."""
    result = result_of(check)
    if result.status == SKIP:
        pytest.skip(result.found)
    if result.status == FAIL:
        pytest.fail(f"{result.title}: {result.found}\nTo do: {result.advice}", pytrace=False)
