"""The environment that workers start with."""

from __future__ import annotations

import pytest

from mst.launch import worker_environment


def test_threads_wait_for_each_other_for_a_short_time() -> None:
    assert int(worker_environment({"HOME": "/home/me"}, {})["GOMP_SPINCOUNT"]) < 300_000


@pytest.mark.parametrize(
    "said", [{"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}]
)
def test_a_user_says_how_they_wait(said: dict[str, str]) -> None:
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    made = worker_environment(said, {})
    assert {name: made[name] for name in names & made.keys()} == said
