"""Where this process runs: its device, its rank among how many. A no-op alone.

The seam for many processes: everything that sums over ranks or picks a device comes through here.
"""

import ctypes
import os
import sys
from dataclasses import dataclass

import torch

from openpalm.errors import SettingsError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks."""
        return value


def world() -> World:
    """The processes of this run. Raises SettingsError under a launcher of several, for now."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise SettingsError(f"WORLD_SIZE ({size}): training on several processes is still to come")
    return World()


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, so that the next step need not ask for it again.

    By default glibc gives every large block back at once, and the kernel clears its pages anew:
    about a tenth of a training step on a CPU. The price is gaps between blocks: a third to
    two thirds more memory where activations are large. Elsewhere than on glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the device has instructions for it, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = getattr(torch.cpu, "get_capabilities", dict)()
        fast = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return "bfloat16" if fast else "float32"


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU; SettingsError for no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"--device {name}: no such device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"--device {name}: this machine has no usable GPU; use cpu")
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"--device {name}: not supported; use auto, cpu or cuda")
    return device
