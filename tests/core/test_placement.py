"""Who started this process, and which seat of the job it has."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from mst.errors import RunError, UsageError
from mst.placement import Placement, first_host, placement
from mst.request import TrainRequest
from mst.seats import meet

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_ID": "2",
}  # fmt: skip


def test_a_process_that_nobody_placed_is_alone() -> None:
    allocation = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_NODELIST": "gpu7"}

    assert placement({}, TrainRequest()) is None
    assert placement(allocation, TrainRequest()) is None


def test_torchrun_and_deepspeeds_launcher_say_the_rank() -> None:
    place = placement(TORCHRUN, TrainRequest())

    assert place == Placement(
        "torchrun", 5, 8, 5, 1, 1, 2, 4, "10.0.0.1", 29400, hosted=True
    )  # fmt: skip
    without = {name: value for name, value in TORCHRUN.items() if "ELASTIC" not in name}
    deepspeed = placement(without, TrainRequest())
    assert deepspeed is not None
    assert not deepspeed.hosted


def test_srun_says_the_rank_and_its_first_host_is_the_meeting_place() -> None:
    place = placement(SRUN, TrainRequest())

    assert place is not None
    assert (place.seat, place.seats, place.first_device) == (3, 4, 1)
    assert (place.nnodes, place.devices_per_node) == (2, 2)
    assert (place.address, place.port) == ("gpu07", 29500)


def test_a_command_typed_on_each_machine_has_a_seat_a_machine() -> None:
    request = TrainRequest(nnodes=2, node_rank=1, master_addr="10.0.0.1", nproc_per_node=4)
    place = placement({}, request)

    assert place is not None
    assert (place.seat, place.seats, place.devices, place.address) == (1, 2, 4, "10.0.0.1")


@pytest.mark.parametrize(
    ("environ", "request_", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "x"}, {}, "RANK is 'x'"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, {}, "as many on every machine"),
        (SRUN | {"SLURM_NNODES": "3"}, {}, "--ntasks-per-node"),
        ({}, {"nnodes": 2}, "needs --master-addr"),
        ({}, {"nnodes": 2, "node_rank": 2, "master_addr": "a"}, "count from 0 to 1"),
    ],
)
def test_what_does_not_fit_together_is_said(
    environ: dict[str, str], request_: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        placement(environ, TrainRequest(**request_))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"), ("gpu7,gpu8", "gpu7"), ("gpu[07-08]", "gpu07"), ("gpu[3,9]", "gpu3"),
        ("login,gpu[3-5]", "login"), ("gpu[1-2]-ib,x", "gpu1-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def seat(number: int, seats: int, port: int) -> Placement:
    return Placement("mst", number, seats, -1, 0, 1, 1, 1, "127.0.0.1", port)


@pytest.fixture
def port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_seat_that_stays_empty_is_named(port: int) -> None:
    take = meet(seat(0, 2, port), {}, seconds=1)

    with pytest.raises(RunError, match="seat 1 of 2 did not come within 1 s"):
        take.__enter__()


def test_a_machine_0_that_is_not_there_is_named(port: int) -> None:
    take = meet(seat(1, 2, port), {}, seconds=1)

    with pytest.raises(RunError, match=f"could not reach machine 0 at 127.0.0.1:{port}"):
        take.__enter__()


def together(places: list[Placement]) -> list[str]:
    """Let each take its seat at the same time; return the errors."""
    errors: list[str] = []

    def take(place: Placement) -> None:
        try:
            with meet(place, {}, seconds=20):
                pass
        except RunError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=take, args=(place,)) for place in places]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    return errors


def test_two_commands_with_one_node_rank_are_named(port: int) -> None:
    errors = together([seat(0, 3, port), seat(1, 3, port), seat(1, 3, port)])

    assert len(errors) == 3
    assert all("seat 1" in each and "taken" in each for each in errors)


def test_unlike_numbers_of_machines_are_named(port: int) -> None:
    errors = together([seat(0, 2, port), seat(1, 3, port)])

    assert any("Pass the same --nnodes everywhere" in each for each in errors)


def test_a_port_that_is_taken_is_said(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        take = meet(seat(0, 2, port), {}, seconds=1)

        with pytest.raises(RunError, match="pass another --master-port"):
            take.__enter__()
