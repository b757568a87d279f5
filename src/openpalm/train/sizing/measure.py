"""What is chosen by measuring, once, before step 1: dtype, steps that fit a time, peak rate.

Works on a model of its own, so that nothing it does can reach the run's weights or random state.
Measuring is bounded: it ends after `_limit_seconds`, or after the one step or look in progress.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from openpalm.base.device import multiplies_bfloat16
from openpalm.model.transformer import Transformer
from openpalm.train.config import PROBES_A_RUN, Chosen, Ramp, TrainSettings
from openpalm.train.objective import StatefulLoader
from openpalm.train.trainer import Trainer

LIMIT_SHARE, LIMIT_S = 0.05, 20.0
"""Measuring may take this share of --minutes, and no more than this many seconds."""
LEAST_REPEATS, MOST_REPEATS, ENOUGH_S = 2, 10, 3.0
"""Steps that are timed after the first: at least, at most, and the seconds that are enough."""
_BFLOAT16_GAIN = 1.05
"""bfloat16 must be this much faster than float32 to be worth its rounding"""
_HOPELESS = 3.0
"""A dtype is given up when its first step takes this many times the best first step."""
_LOOKS_SHARE = 0.1
"""of a time budget that evaluations may take"""
_FORWARD_SHARE = 0.4
"""of a training step's time that the loss alone takes, no gradient wanted"""


class Look(Protocol):
    """Something looked at now and then, whose time a budget must hold."""

    @property
    def measure(self) -> Callable[[Transformer, torch.dtype], object]: ...

    @property
    def tokens(self) -> int | None:
        """Tokens that it computes the loss of, where that is all it does."""
        ...


def choose(
    settings: TrainSettings,
    make_trainer: Callable[[torch.dtype], Trainer],
    looks: Sequence[Look],
    device: torch.device,
    *,
    step_tokens: int,
    say: Callable[[str], None] = lambda line: None,
) -> Chosen:
    """Fills what the settings left open; what an earlier run chose stays.

    `make_trainer` gives a scratch trainer; a step of it is of `step_tokens`. `say` hears what is
    being timed.
    """
    started = time.perf_counter()
    until = started + _limit_seconds(settings)
    known = settings.chosen
    dtype: str = settings.dtype if settings.dtype != "auto" else known.dtype or "auto"
    timed: dict[str, _Timed] = {}
    if dtype == "auto":
        timed = _time_candidates(make_trainer, device, until, say)
        faster = len(timed) > 1 and timed["bfloat16"].best * _BFLOAT16_GAIN < timed["float32"].best
        dtype = "bfloat16" if faster else "float32"
    assert dtype in ("float32", "bfloat16")
    torch_dtype = getattr(torch, dtype)
    peak = known.peak_flops or matmul_flops(device, torch_dtype)
    chosen = replace(known, dtype=dtype, peak_flops=peak)
    if known.steps is not None or settings.minutes is None:
        return chosen
    trainer = make_trainer(torch_dtype)
    if dtype not in timed:
        say(f"timing a step in {dtype}")
        timed[dtype] = _time_steps(trainer, until)
    step_s = timed[dtype].best * Ramp.parse(settings.batch_ramp).mean
    say("timing an evaluation")
    look_s = _look_seconds(trainer, looks, timed[dtype].best / step_tokens, until)
    left_s = settings.minutes * 60 - (time.perf_counter() - started)
    steps, eval_every = fit(left_s, step_s, look_s, settings.eval_every)
    return replace(chosen, steps=steps, eval_every=eval_every)


def _limit_seconds(settings: TrainSettings) -> float:
    return min(LIMIT_S, LIMIT_SHARE * 60 * (settings.minutes or math.inf))


def fit(left_s: float, step_s: float, look_s: float, eval_every: int | None) -> tuple[int, int]:
    """Steps that fit in `left_s`, and how many apart the looks at the model may be.

    Where `eval_every` leaves it open there are ten looks, or as many as take a tenth of the time.
    """
    if eval_every:
        return max(1, int(left_s / (step_s + look_s / eval_every))), eval_every
    looks = max(1, min(PROBES_A_RUN, int(_LOOKS_SHARE * left_s / max(look_s, 1e-9))))
    steps = max(1, int((left_s - looks * look_s) / step_s))
    return steps, max(1, -(-steps // looks))


@dataclass(frozen=True)
class _Timed:
    """Seconds of an optimizer step: the first, and the best of all."""

    first: float
    best: float


def _time_candidates(
    make_trainer: Callable[[torch.dtype], Trainer],
    device: torch.device,
    until: float,
    say: Callable[[str], None],
) -> dict[str, _Timed]:
    """By dtype. Empty where bfloat16 is only emulated: float32 is then known to be faster."""
    if not multiplies_bfloat16(device):
        return {}
    timed: dict[str, _Timed] = {}
    for name in ("float32", "bfloat16"):
        say(f"timing a step in {name}")
        left_s = until - time.perf_counter()
        share = until - left_s / 2 if name == "float32" else until
        hopeless = _HOPELESS * min((t.first for t in timed.values()), default=math.inf)
        trainer = make_trainer(getattr(torch, name))
        timed[name] = _time_steps(trainer, share, hopeless=hopeless)
    return timed


def _look_seconds(trainer: Trainer, looks: Sequence[Look], token_s: float, until: float) -> float:
    """Seconds of all looks: timed where there is time, else foretold from a step's."""
    total = 0.0
    for look in looks:
        foretold = None if look.tokens is None else look.tokens * token_s * _FORWARD_SHARE
        if foretold is not None and time.perf_counter() + foretold > until:
            total += foretold
            continue
        start = time.perf_counter()
        look.measure(trainer.model, trainer.dtype)
        total += time.perf_counter() - start
    return total


def _time_steps(trainer: Trainer, until: float, *, hopeless: float = math.inf) -> _Timed:
    """One step to warm up, then the best of several while there is time, so that a moment's load
    does not count; the first alone where it is hopeless.
    """
    first = best = _step_seconds(trainer)
    if first > hopeless:
        return _Timed(first, math.inf)
    spent = 0.0
    for repeat in range(MOST_REPEATS):
        enough = repeat >= LEAST_REPEATS and spent >= ENOUGH_S
        if enough or time.perf_counter() + best > until:
            break
        seconds = _step_seconds(trainer)
        spent += seconds
        best = min(best, seconds)
    return _Timed(first, best)


def _step_seconds(trainer: Trainer) -> float:
    """Seconds of an optimizer step, of whose microbatches one alone is computed."""
    _wait(trainer.device)
    start = time.perf_counter()
    if isinstance(trainer.loader, StatefulLoader):  # its batches come by the step
        trainer.train_step()
        _wait(trainer.device)
        return time.perf_counter() - start
    trainer.model.train()
    loss, count, _ = trainer.forward_backward([next(trainer.loader)])
    _wait(trainer.device)
    between = time.perf_counter()
    trainer.optimizer_step(loss, count, 1.0)
    _wait(trainer.device)
    return (between - start) * trainer.accumulation + time.perf_counter() - between


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
