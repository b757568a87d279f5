"""What the parts of gpu.py have in common: the machine, the time budget, the rows.

A part is a list of items. Every row is printed and written as soon as it is known. An item that
does not fit into the rest of its part's time is left out, and an item that fails prints its error:
both give one row, and the others run.
"""

import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from train_common import Row, sized

from openpalm.model.config import ModelConfig

TINY = 0.1
"""Share of the time on a GPU that the rehearsal's small shapes are given."""
SPARE_S = 20
"""Seconds after which a call that no signal reaches, such as a kernel that hangs, is ended."""


@dataclass
class Bench:
    """Where to run, how large, until when, and the rates of the device once they are measured."""

    device: torch.device
    tiny: bool = False
    peer: Path | None = None
    """folder with palm-rlhf-pytorch"""
    models: list[str] = field(default_factory=list)
    processes: int = 1
    """most processes of the FSDP part"""
    ends: float = 0.0
    """time.monotonic() at which the present part ends"""
    matmul: float = 0.0
    """FLOP/s of a large matrix product in bfloat16; 0 if not measured"""
    copy: float = 0.0
    """bytes/s of a copy on the device, read and written; 0 if not measured"""

    def config(self, name: str) -> ModelConfig:
        if self.tiny:
            return replace(sized("palm-tiny", 64), dim=64, depth=2, ff_dim=128)
        return sized(name, 8192)

    @property
    def backend(self) -> str:
        """Of torch.compile; the rehearsal needs no C++ compiler."""
        return "eager" if self.tiny else "inductor"

    @property
    def left_s(self) -> float:
        """Seconds left to the present part."""
        return self.ends - time.monotonic()

    def fits(self, needs_s: float) -> bool:
        """Whether work of so many seconds on an H100 fits into the rest of the part."""
        return needs_s * (TINY if self.tiny else 1) <= self.left_s

    def left_out(self, needs_s: float) -> str:
        """The reason to leave out work that does not fit."""
        needs_s *= TINY if self.tiny else 1
        return f"needs about {needs_s:.0f} s of the {max(0.0, self.left_s):.0f} s left to its part"


class Item(NamedTuple):
    name: str
    needs_s: float
    """seconds on an H100, roughly"""
    rows: Callable[[], Iterable[Row]]


class Part(NamedTuple):
    name: str
    share_s: float
    """seconds of the default budget; what earlier parts leave is added"""
    items: Callable[[Bench], Iterable[Item]]


def measure(bench: Bench, parts: list[Part], seconds: float, out: Path | None) -> bool:
    """Runs the parts; returns whether every check held and nothing failed."""
    started, shares, good = time.monotonic(), sum(part.share_s for part in parts), True
    past = 0.0
    for part in parts:
        past += part.share_s
        bench.ends = started + seconds * past / shares
        began = time.monotonic()
        for item in part.items(bench):
            good &= run_item(bench, part.name, item, out)
        tell("time", {"of": part.name, "seconds": time.monotonic() - began}, out)
    return good


def run_item(bench: Bench, part: str, item: Item, out: Path | None) -> bool:
    good = True
    if not bench.fits(item.needs_s):
        tell(part, {"item": item.name, "left_out": bench.left_out(item.needs_s)}, out)
        return True
    try:
        with at_most(bench.left_s):
            for row in item.rows():
                good &= row.get("ok", True)
                tell(part, row, out)
    except Exception as error:
        good = False
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"[:300]
        tell(part, {"item": item.name, "error": text}, out)
    with suppress(RuntimeError):  # of a failed kernel, which was already reported
        clear()
    return good


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def tell(part: str, row: Row, out: Path | None) -> None:
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part} | row) + "\n")
    print(f"{part:<10} {'  '.join(f'{k} {spelt(v)}' for k, v in row.items())}", flush=True)


def spelt(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clear() -> None:
    """Gives memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(work: Callable[[], Any], device: torch.device, repeats: int = 8) -> float:
    """Seconds of the best of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


@contextmanager
def memory(device: torch.device) -> Iterator[Row]:
    """Afterwards `peak_gb` of what was allocated inside; nothing on a CPU."""
    measured: Row = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield measured
    if device.type == "cuda":
        measured["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
