"""What a worker makes of the signals that it gets."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from mst.worker_process import StopAsked


@pytest.fixture
def stop() -> Iterator[StopAsked]:
    """A worker's handler in its loop; what was there before is put back."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    made = StopAsked()
    made.in_loop = True
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigterm_says_nothing_new_and_a_second_ctrl_c_stops_at_once(
    stop: StopAsked, first: signal.Signals
) -> None:
    os.kill(os.getpid(), first)
    assert stop()
    # Slurm sends one to every process of a job, and those above hand theirs on.
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_outside_the_loop_stops_at_once_and_lets_the_ending_end(stop: StopAsked) -> None:
    stop.in_loop = False
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
