"""The ways out of a machine: all open outside the jail, none inside, whatever the layer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

LAYERS = ("namespace", "user", "broker", "seccomp")
REACHED = {"namespace": "-namespace", "user": "user-namespace"}
Take = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def open_ways() -> list[str]:
    """Names of the ways that were open outside; filled by the first test."""
    return []


def test_outside_they_lead_out(take_ways: Take, open_ways: list[str]) -> None:
    found = take_ways("outside")["ways"]
    closed = {
        name: said
        for name, said in found.items()
        if said != "out" and not said.startswith("missing")
    }
    open_ways += [name for name, said in found.items() if said == "out"]

    assert len(open_ways) >= 20, found
    # Where a kernel or a container withholds one, nothing is learnt from it inside.
    assert len(closed) <= (4 if os.geteuid() == 0 else 8), closed


@pytest.mark.parametrize("layer", LAYERS)
def test_inside_they_are_closed(layer: str, take_ways: Take, open_ways: list[str]) -> None:
    found = take_ways(layer)

    assert found["layer"].endswith(REACHED.get(layer, layer))
    assert {name: said for name, said in found["ways"].items() if said == "out"} == {}
    assert open_ways == [] or set(open_ways) <= set(found["ways"])
    # Each is refused by the kernel, none by chance: nothing hangs.
    assert "no answer" not in found["ways"].values()


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["outside", "broker"])
def test_a_store_of_torch_stays_inside(layer: str, take_ways: Take) -> None:
    found = take_ways(layer, torch=True)["ways"]["store of torch"]

    assert (found == "out") == (layer == "outside"), found
