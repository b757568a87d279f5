"""Devices: FLOP/s, memory and links, as their makers publish them; and this machine's, measured.

FLOP/s are dense (without sparsity). float32 is without TF32, as torch multiplies by default.
"""

from collections.abc import Callable
from dataclasses import dataclass

from openpalm.base.device import physical_memory
from openpalm.errors import SettingsError

GIB = float(1 << 30)
TERA = 1e12
LEFT_OF_MEMORY = 0.06
"""Share of a GPU's memory that tensors do not get: CUDA's context, NCCL, unused pieces."""


@dataclass(frozen=True)
class Device:
    """One GPU (or the CPU), and its links."""

    name: str
    peak: dict[str, float]
    """FLOP/s of matrix multiplication by dtype; a dtype that is missing is only emulated"""
    memory: float
    """bytes"""
    bandwidth: float
    """bytes per second from the device's memory"""
    intra: float
    """bytes per second to the GPUs of the same node, in one direction"""
    inter: float
    """bytes per second to other nodes, for each GPU"""
    per_node: int = 8
    """GPUs of a node"""
    cuda: bool = True
    matmul: float = 0.7
    """share of the peak that large matrix multiplications reach; an assumption"""
    attention: float = 0.5
    """share of the peak that attention reaches; an assumption"""

    @property
    def usable(self) -> float:
        """Bytes for tensors."""
        return self.memory * (1 - LEFT_OF_MEMORY)

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s. Raises SettingsError for a dtype that the device only emulates."""
        if dtype not in self.peak:
            raise SettingsError(
                f"--dtype {dtype}: {self.name} has none; take {', '.join(self.peak)}"
            )
        return self.peak[dtype]


def _rates(bfloat16: float, float32: float) -> dict[str, float]:
    return {"bfloat16": bfloat16 * TERA, "float32": float32 * TERA}


DEVICES = {
    device.name: device
    for device in (
        Device("h100", _rates(989.4, 66.9), 80 * GIB, 3.35e12, 450e9, 50e9, matmul=0.65),
        Device("h200", _rates(989.4, 66.9), 140 * GIB, 4.8e12, 450e9, 50e9, matmul=0.65),
        Device("a100", _rates(312, 19.5), 80 * GIB, 2.04e12, 300e9, 25e9),
        Device("a100-40gb", _rates(312, 19.5), 40 * GIB, 1.56e12, 300e9, 25e9),
        Device("l40s", _rates(362, 91.6), 45 * GIB, 0.86e12, 32e9, 12.5e9),
        Device("rtx4090", _rates(165.2, 82.6), 24 * GIB, 1.01e12, 32e9, 3e9, 4),
        Device("v100", {"float32": 15.7 * TERA}, 32 * GIB, 0.9e12, 150e9, 12.5e9),
        Device("t4", {"float32": 8.1 * TERA}, 15 * GIB, 0.3e12, 16e9, 5e9, 4),
        Device("tpu-v4", {"bfloat16": 275 * TERA}, 32 * GIB, 1.2e12, 100e9, 100e9, 4),
    )
}


def device_named(name: str, dtype: str, say: Callable[[str], None] = lambda line: None) -> Device:
    """The device with this name; `cpu` is measured, which takes some seconds and needs torch."""
    if name == "cpu":
        say("cpu: measuring this machine")
        return measured_cpu(dtype)
    if name not in DEVICES:
        known = ", ".join([*DEVICES, "cpu"])
        raise SettingsError(f"--gpu {name}: not known; take one of {known}")
    return DEVICES[name]


def measured_cpu(dtype: str) -> Device:
    """This machine: rate of a matrix multiplication, of an elementwise pass, physical memory."""
    import torch

    from openpalm.train.sizing.measure import matmul_flops

    rate = matmul_flops(torch.device("cpu"), getattr(torch, dtype))
    memory, speed = physical_memory(), _elementwise_rate()
    return Device("cpu", {dtype: rate}, memory, speed, speed, speed, 1, False, 0.9, 0.5)


def _elementwise_rate(repeats: int = 5) -> float:
    """Best bytes per second of a product of two vectors that no cache holds."""
    import time

    import torch

    a, b, out = (torch.ones(16 << 20) for _ in range(3))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mul(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 3 * a.nbytes / best
