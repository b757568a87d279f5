"""What is chosen by measuring, once, before step 1: dtype, steps that fit a time, peak rate.

Works on a model of its own, so that nothing it does can reach the run's weights or random state.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from openpalm.model.transformer import Transformer
from openpalm.train.config import PROBES_A_RUN, Chosen, Ramp, TrainSettings
from openpalm.train.trainer import Trainer

_BFLOAT16_GAIN = 1.05
"""bfloat16 must be this much faster than float32 to be worth its rounding"""
_LOOKS_SHARE = 0.1
"""of a time budget that evaluations may take"""


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
    dtype: str = settings.dtype if settings.dtype != "auto" else known.dtype or "auto"
    timed: dict[str, float] = {}
    if dtype == "auto":
        timed = {name: _step_seconds(make_trainer(d)) for name, d in _candidates(device)}
        faster = timed.get("bfloat16", math.inf) * _BFLOAT16_GAIN < timed["float32"]
        dtype = "bfloat16" if faster else "float32"
    assert dtype in ("float32", "bfloat16")
    torch_dtype = getattr(torch, dtype)
    peak = known.peak_flops or matmul_flops(device, torch_dtype)
    chosen = replace(known, dtype=dtype, peak_flops=peak)
    if known.steps is not None or settings.minutes is None:
        return chosen
    trainer = make_trainer(torch_dtype)
    whole_step_s = timed.get(dtype) or _step_seconds(trainer)
    step_s = whole_step_s * Ramp.parse(settings.batch_ramp).mean
    look_s = _look_seconds(trainer, looks)
    left_s = settings.minutes * 60 - (time.perf_counter() - started)
    steps, eval_every = fit(left_s, step_s, look_s, settings.eval_every)
    return replace(chosen, steps=steps, eval_every=eval_every)


def fit(left_s: float, step_s: float, look_s: float, eval_every: int | None) -> tuple[int, int]:
    """Steps that fit in `left_s`, and how many apart the looks at the model may be.

    Where `eval_every` leaves it open there are ten looks, or as many as take a tenth of the time.
    """
    if eval_every:
        return max(1, int(left_s / (step_s + look_s / eval_every))), eval_every
    looks = max(1, min(PROBES_A_RUN, int(_LOOKS_SHARE * left_s / max(look_s, 1e-9))))
    steps = max(1, int((left_s - looks * look_s) / step_s))
    return steps, max(1, -(-steps // looks))


def _look_seconds(
    trainer: Trainer, looks: Sequence[Callable[[Transformer, torch.dtype], object]]
) -> float:
    start = time.perf_counter()
    for look in looks:
        look(trainer.model, trainer.dtype)
    return time.perf_counter() - start


def _candidates(device: torch.device) -> list[tuple[str, torch.dtype]]:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return [("float32", torch.float32)]
    return [("float32", torch.float32), ("bfloat16", torch.bfloat16)]


def _step_seconds(trainer: Trainer, repeats: int = 2) -> float:
    """Seconds of an optimizer step, the best of a few after one to warm up."""
    trainer.train_step()
    times = []
    for _ in range(repeats):
        _wait(trainer.device)
        start = time.perf_counter()
        trainer.train_step()
        _wait(trainer.device)
        times.append(time.perf_counter() - start)
    return min(times)


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
