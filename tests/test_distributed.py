"""Alone, every sum is the value itself; a device that is not there is named."""

import platform
import subprocess
import sys

import pytest
import torch

from openpalm.distributed import World, pick_device, pick_dtype, world
from openpalm.errors import SettingsError


def test_alone_a_sum_is_the_value(monkeypatch: pytest.MonkeyPatch):
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert world() == World(rank=0, size=1)
    assert world().sum(0.1) == 0.1


def test_several_processes_are_refused_for_now(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"WORLD_SIZE \(2\)"):
        world()


@pytest.mark.parametrize("gpu", [True, False])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, gpu: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert pick_device("auto").type == ("cuda" if gpu else "cpu")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "cuda"])
def test_no_such_device_is_named(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=rf"^--device {name}: .*use .*cpu"):
        pick_device(name)


@pytest.mark.parametrize(
    ("able", "dtype"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({}, "float32")],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert pick_dtype("auto", torch.device("cpu")) == dtype
    assert pick_dtype("float32", torch.device("cpu")) == "float32"


FAULTS = """
import resource, sys, torch
from openpalm.distributed import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()

def faults(numbers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(16 << 20)
print(faults(15 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_there_for_the_next_tensor():
    def faults(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") * 10 < faults("given back")
