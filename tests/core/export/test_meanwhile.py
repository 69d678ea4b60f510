"""What is computed while a target quantizes: its result, its errors, and its end."""

from __future__ import annotations

import threading
import time

import pytest

from mst.errors import Interrupted
from mst.export.meanwhile import GoOn, Meanwhile


@pytest.mark.parametrize("beside", [True, False])
def test_a_result_is_given_as_often_as_it_is_asked_for_and_computed_once(beside: bool) -> None:
    threads: list[threading.Thread] = []

    def double(go_on: GoOn, number: int) -> int:
        go_on()
        threads.append(threading.current_thread())
        return 2 * number

    with Meanwhile(beside) as meanwhile:
        one, other = meanwhile.begin(double, 3), meanwhile.begin(double, number=4)
        found = [other(), one(), one(), other()]

    assert found == [8, 6, 6, 8]
    assert len(threads) == 2
    assert (threading.current_thread() in threads) != beside


@pytest.mark.parametrize("beside", [True, False])
def test_an_error_surfaces_where_the_result_is_asked_for(beside: bool) -> None:
    def fail(go_on: GoOn) -> None:
        raise LookupError("no such weight")

    with Meanwhile(beside) as meanwhile:
        result = meanwhile.begin(fail)
        with pytest.raises(LookupError, match="no such weight"):
            result()


def test_leaving_ends_what_runs_and_drops_what_has_not_begun() -> None:
    running = threading.Event()
    ended: list[type[BaseException]] = []

    def endless(go_on: GoOn) -> None:
        running.set()
        try:
            while True:
                go_on()
                time.sleep(0.01)
        except Interrupted as error:
            ended.append(type(error))
            raise

    def broken_off() -> None:
        with Meanwhile(beside=True) as meanwhile:
            meanwhile.begin(endless)
            meanwhile.begin(lambda go_on: ended.append(AssertionError))
            running.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()

    assert ended == [Interrupted]
