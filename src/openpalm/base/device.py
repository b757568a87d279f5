"""Device and dtype selection (--device auto, --dtype auto) and native CPU instructions.

The only module that queries the processor's instructions. torch is imported inside the functions.
"""

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from openpalm.base.launcher import own_gpu
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_LEVELS: list[str] = [
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
    *("AVX512_CORE_BF16", "AVX10_1_512", "AVX512_CORE_FP16"),
    *("AVX10_1_512_AMX", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16"),
]
"""values of ONEDNN_MAX_CPU_ISA, lowest first"""


def multiplies_bfloat16(device: "torch.device | None" = None) -> bool:
    """Whether the device (None is the CPU) has instructions for products of bfloat16.

    Elsewhere bfloat16 is emulated: a training step takes up to 11 times a float32 one.
    """
    import torch

    if device is not None and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device is not None and device.type != "cpu":
        return False
    return _has({"avx512_bf16": "AVX512_CORE_BF16", "amx_bf16": "AVX512_CORE_AMX", "bf16": ""})


def multiplies_int8() -> bool:
    """Whether the CPU sums products of 8-bit numbers in 32 bits, and torch has oneDNN for it."""
    import torch

    names = {"avx512_vnni": "AVX512_CORE_VNNI", "avx_vnni": "AVX2_VNNI"}
    return _has(names | {"amx_int8": "AVX512_CORE_AMX"}) and torch.backends.mkldnn.is_available()


def _has(instructions: dict[str, str]) -> bool:
    """Whether the CPU has any of torch's capability names, at a level that oneDNN may use."""
    import torch

    able = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name, False) and _allowed(level) for name, level in instructions.items())


def _allowed(level: str) -> bool:
    """Whether ONEDNN_MAX_CPU_ISA, which hides instructions from oneDNN, permits this level."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return most not in _LEVELS or not level or _LEVELS.index(level) <= _LEVELS.index(most)


def processor() -> str:
    """The processor as text: name, cores, native dtypes."""
    import platform

    import torch

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    widest = torch.backends.cpu.get_cpu_capability().lower()
    native = {"bfloat16": multiplies_bfloat16(), "int8": multiplies_int8()}
    also = [name for name, has in native.items() if has]
    return f"{name}, {os.cpu_count()} cores, {', '.join([widest, *also])}"


def pick_dtype(name: str, device: "torch.device") -> str:
    """`auto` is bfloat16 where the device has instructions for it, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def pick_device(name: str) -> "torch.device":
    """`auto` is a CUDA GPU where there is one, else the CPU; SettingsError for no such device.

    mps, Apple's GPU, is used where torch offers it and it is asked for. It is untested.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(
            f"--device {name}: no such device; use auto, cpu, cuda or mps"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"--device {name}: this machine has no usable GPU; use cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", own_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError(f"--device {name}: torch offers no Apple GPU here; use cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(f"--device {name}: not supported; use auto, cpu, cuda or mps")
    return device


def free_memory(device: "torch.device") -> float:
    """Bytes that this process may take on a GPU, its own included; or the machine's memory."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    # torchrun's processes on this machine share it.
    return physical_memory() / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def physical_memory() -> float:
    """Bytes of this machine's memory, or those that a container may use, if fewer."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            return min(total, float(file.read()))
    except (OSError, ValueError):  # no container, or "max"
        return total


def keep_freed_memory() -> None:
    """Keeps freed memory in this process (glibc mallopt), so that the next step reuses it.

    By default glibc gives every large block back at once, and the kernel clears its pages again:
    about a tenth of a training step on a CPU. The price is gaps between blocks: a third to
    two thirds more memory where activations are large. Without glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
