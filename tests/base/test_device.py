"""What this processor computes natively is asked in one place; a device not there is named."""

import platform
import subprocess
import sys

import pytest
import torch

from openpalm.base.device import (
    multiplies_bfloat16,
    multiplies_int8,
    pick_device,
    pick_dtype,
    processor,
)
from openpalm.errors import SettingsError


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.mark.parametrize("gpu", [True, False])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, gpu: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert pick_device("auto").type == ("cuda" if gpu else "cpu")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "cuda"])
def test_no_such_device_is_named(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=rf"^--device {name}: .*use .*cpu"):
        pick_device(name)


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"architecture": "arm64", "bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx512_vnni": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert pick_dtype("auto", torch.device("cpu")) == dtype
    assert pick_dtype("float32", torch.device("cpu")) == "float32"


@pytest.mark.parametrize(
    ("limit", "bfloat16", "int8"),
    [
        ("", True, True),
        ("DEFAULT", True, True),
        ("AVX2", False, False),
        ("avx512_core_vnni", False, True),
        ("AVX512_CORE_BF16", True, True),
    ],
)
def test_what_onednn_must_not_use_is_not_native(monkeypatch, limit, bfloat16, int8):
    able = {"avx512_bf16": True, "avx512_vnni": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert multiplies_bfloat16() == bfloat16
    assert multiplies_int8() == int8


def test_an_apple_gpu_is_used_where_torch_offers_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps").type == "mps"
    assert not multiplies_bfloat16(torch.device("mps"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=r"^--device mps: .*use cpu"):
        pick_device("mps")


def test_the_processor_in_words():
    assert "cores" in processor()
    assert ("bfloat16" in processor().split("cores")[1]) == multiplies_bfloat16()


FAULTS = """
import resource, sys, torch
from openpalm.base.device import keep_freed_memory
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
