"""Alone, every sum is the value itself; axes make the number of processes."""

import socket

import pytest
import torch
from ports import free_port

from openpalm.errors import SettingsError, WorkError
from openpalm.parallel.config import Axes, ParallelSettings, axes_of
from openpalm.parallel.world import World, join, world

CPU = torch.device("cpu")


def test_alone_a_sum_is_the_value():
    alone = world()
    assert alone == World(rank=0, size=1)
    assert alone.sum(0.1) == alone.max(0.1) == 0.1
    assert alone.gather("a") == ["a"]
    assert alone.broadcast("a") == alone.on_main(lambda: "a") == alone.together(lambda: "a") == "a"
    assert alone.is_main
    assert alone.contributes


def test_processes_that_cannot_find_each_other_are_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="start them with torchrun"):
        join(ParallelSettings(), CPU)


def test_processes_that_never_start_are_one_line(monkeypatch: pytest.MonkeyPatch):
    found = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    found["MASTER_PORT"] = str(free_port())
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    said = r"not all 2 processes \(WORLD_SIZE\) met at 127.0.0.1 .* within 1 s: .*unset"
    with pytest.raises(WorkError, match=said):
        join(ParallelSettings(timeout_s=1), CPU)


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ("0", r"port \d+ of this machine \(MASTER_PORT\) is used by another program"),
        ("1", r"not all 2 processes .*: what listens there does not answer; start all"),
    ],
)
def test_another_program_at_the_port_is_one_line(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("openpalm.parallel.world._RENDEZVOUS_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        found["MASTER_PORT"] = str(other.getsockname()[1])
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(WorkError, match=said):
            join(ParallelSettings(timeout_s=1), CPU)


@pytest.mark.parametrize(
    ("given", "processes", "axes"),
    [
        ({}, 1, Axes()),
        ({}, 8, Axes(shard=8)),
        ({"shard": 1}, 8, Axes(replicate=8)),
        ({"shard": 2}, 8, Axes(shard=2, replicate=4)),
        ({"replicate": 2}, 8, Axes(shard=4, replicate=2)),
        ({"tensor": 4}, 8, Axes(shard=2, tensor=4)),
        ({"tensor": 2, "pipeline": 2, "context": 2}, 8, Axes(pipeline=2, context=2, tensor=2)),
    ],
)
def test_axes_that_are_not_given_are_inferred(given: dict[str, int], processes: int, axes: Axes):
    found = axes_of(ParallelSettings(**given), processes)
    assert found == axes
    assert found.size == processes


@pytest.mark.parametrize(
    ("given", "processes", "said"),
    [
        ({"tensor": 3}, 8, "tensor 3 cannot make 8 processes.*each is one of 1, 2, 4, 8"),
        ({"shard": 2, "replicate": 2}, 8, "replicate 2 x shard 2 cannot make 8 processes"),
        (
            {"tensor": 2},
            1,
            "tensor 2 needs 2 processes, and this is one; start it as torchrun --nproc-per-node 2",
        ),
    ],
)
def test_impossible_products_are_refused(given: dict[str, int], processes: int, said: str):
    with pytest.raises(SettingsError, match=said):
        axes_of(ParallelSettings(**given), processes)


def test_every_process_has_a_place_of_its_own():
    axes = Axes(pipeline=2, replicate=1, shard=3, context=2, tensor=2)
    places = [tuple(axes.coordinate(rank).values()) for rank in range(axes.size)]
    assert len(set(places)) == axes.size
    # Neighbours are of one tensor-parallel group: they talk most, over the fastest links.
    assert axes.coordinate(0) | {"tensor": 1} == axes.coordinate(1)
