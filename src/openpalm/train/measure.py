"""What is chosen by measuring, once, before step 1: dtype, steps that fit a time, peak rate.

Works on a model of its own, so that nothing it does can reach the run's weights or random state.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from openpalm.model.transformer import Transformer
from openpalm.train.config import PROBES_A_RUN, Chosen, TrainSettings
from openpalm.train.trainer import Trainer

_BFLOAT16_GAIN = 1.05
"""bfloat16 must be this much faster than float32 to be worth its rounding"""


def choose(
    settings: TrainSettings,
    make_trainer: Callable[[torch.dtype], Trainer],
    looks: Sequence[Callable[[Transformer, torch.dtype], object]],
    device: torch.device,
) -> Chosen:
    """Fills what the settings left open; what an earlier run chose stays.

    `make_trainer` gives a scratch trainer; `looks` are the probes whose time a budget must hold.
    """
    started = time.perf_counter()
    known = settings.chosen
    dtype: str = known.dtype or settings.dtype
    if dtype == "auto":
        timed = {name: _step_seconds(make_trainer(d)) for name, d in _candidates(device)}
        faster = timed.get("bfloat16", math.inf) * _BFLOAT16_GAIN < timed["float32"]
        dtype = "bfloat16" if faster else "float32"
    torch_dtype = getattr(torch, dtype)
    steps = known.steps
    if steps is None and settings.minutes is not None:
        step_s, looks_s = _seconds(make_trainer(torch_dtype), looks)
        left_s = settings.minutes * 60 - (time.perf_counter() - started)
        steps = _steps_that_fit(left_s, step_s, looks_s, settings.eval_every)
    peak = known.peak_flops or matmul_flops(device, torch_dtype)
    assert dtype in ("float32", "bfloat16")
    return replace(known, dtype=dtype, steps=steps, peak_flops=peak)


def _seconds(
    trainer: Trainer, looks: Sequence[Callable[[Transformer, torch.dtype], object]]
) -> tuple[float, float]:
    """Of an optimizer step, and of all the probes together."""
    step_s = _step_seconds(trainer)
    start = time.perf_counter()
    for look in looks:
        look(trainer.model, trainer.dtype)
    return step_s, time.perf_counter() - start


def _steps_that_fit(left_s: float, step_s: float, looks_s: float, eval_every: int | None) -> int:
    if eval_every:
        return max(1, int(left_s / (step_s + looks_s / eval_every)))
    return max(1, int((left_s - PROBES_A_RUN * looks_s) / step_s))


def _candidates(device: torch.device) -> list[tuple[str, torch.dtype]]:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return [("float32", torch.float32)]
    return [("float32", torch.float32), ("bfloat16", torch.bfloat16)]


def _step_seconds(trainer: Trainer, repeats: int = 3) -> float:
    """Median seconds of an optimizer step after one to warm up."""
    trainer.train_step()
    times = []
    for _ in range(repeats):
        _wait(trainer.device)
        start = time.perf_counter()
        trainer.train_step()
        _wait(trainer.device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The machine's best matrix-multiply rate, FLOP/s: the peak that shares are given of."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
