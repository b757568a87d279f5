"""Measures, before step 1, the faster dtype, the number of steps that fit --minutes, peak FLOP/s.

Works on a model of its own, so that it cannot change the run's weights or random state. It stops
after `_limit_seconds`, or after the step or probe in progress then.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from openpalm.base.device import multiplies_bfloat16
from openpalm.train.batch_shape import Ramp
from openpalm.train.config import PROBES_PER_RUN, TrainSettings
from openpalm.train.objective import StatefulLoader
from openpalm.train.probes import Probe
from openpalm.train.trainer import Trainer

LIMIT_SHARE, LIMIT_S = 0.05, 20.0
"""Measuring may take this share of --minutes, and at most this many seconds."""
LEAST_REPEATS, MOST_REPEATS, ENOUGH_S = 2, 10, 3.0
"""Steps timed after the first: at least, at most, and the seconds after which to stop."""
_HALF_GAIN = 1.05
"""a 16-bit dtype must be faster than float32 by this factor to be worth its rounding"""
_HOPELESS = 3.0
"""a dtype is given up if its first step takes this many times the best first step"""
_PROBES_SHARE = 0.1
"""share of a time budget that probes may take"""
_FORWARD_SHARE = 0.4
"""time of the loss without gradients, as a share of a training step's"""


@dataclass(frozen=True)
class Measured:
    """The results: values for run.json."""

    dtype: Literal["float32", "bfloat16", "float16"]
    peak_flops: float
    steps: int | None = None
    """steps that fit --minutes; None where the number was known"""
    eval_every: int | None = None


def measure(
    settings: TrainSettings,
    make_trainer: Callable[[torch.dtype], Trainer],
    probes: Sequence[Probe],
    device: torch.device,
    *,
    step_tokens: int,
    steps_known: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Measured:
    """Measures the dtype if it is auto, and the steps that fit --minutes unless they are known.

    `make_trainer` makes a scratch trainer with steps of `step_tokens` tokens. `say` receives what
    is being timed.
    """
    started = time.perf_counter()
    until = started + _limit_seconds(settings)
    dtype, timed = settings.dtype, dict[str, _Timed]()
    if dtype == "auto":
        half = _half(device, settings)
        timed = _time_candidates(make_trainer, half, until, say) if half else {}
        faster = half and timed[half].best * _HALF_GAIN < timed["float32"].best
        dtype = half if half and faster else "float32"
    torch_dtype = getattr(torch, dtype)
    peak_flops = matmul_flops(device, torch_dtype)
    if steps_known or settings.minutes is None:
        return Measured(dtype, peak_flops)
    trainer = make_trainer(torch_dtype)
    if dtype not in timed:
        say(f"timing a step in {dtype}")
        timed[dtype] = _time_steps(trainer, until)
    step_s = timed[dtype].best * Ramp.parse(settings.batch_ramp).mean
    say("timing an evaluation")
    token_s = timed[dtype].best / step_tokens
    together = [probe for probe in probes if probe.every is None]
    probes_s = _probe_seconds(trainer, together, token_s, until)
    # A probe with steps of its own makes every step longer, whatever the number of evaluations.
    for probe in probes:
        if probe.every is not None:
            step_s += _probe_seconds(trainer, [probe], token_s, until) / probe.every
    left_s = settings.minutes * 60 - (time.perf_counter() - started)
    steps, eval_every = fit(left_s, step_s, probes_s, settings.eval_every)
    return Measured(dtype, peak_flops, steps, eval_every)


def _limit_seconds(settings: TrainSettings) -> float:
    return min(LIMIT_S, LIMIT_SHARE * 60 * (settings.minutes or math.inf))


def fit(left_s: float, step_s: float, probes_s: float, eval_every: int | None) -> tuple[int, int]:
    """Number of steps that fit `left_s`, and the steps between evaluations.

    If `eval_every` is not given there are ten evaluations, or as many as take a tenth of the time.
    """
    if eval_every:
        return max(1, int(left_s / (step_s + probes_s / eval_every))), eval_every
    evaluations = max(1, min(PROBES_PER_RUN, int(_PROBES_SHARE * left_s / max(probes_s, 1e-9))))
    steps = max(1, int((left_s - evaluations * probes_s) / step_s))
    return steps, max(1, -(-steps // evaluations))


@dataclass(frozen=True)
class _Timed:
    """Seconds per optimizer step: of the first step, and of the fastest."""

    first: float
    best: float


def _half(device: torch.device, settings: TrainSettings) -> Literal["bfloat16", "float16"] | None:
    """The 16-bit dtype that the device multiplies, if any; emulated ones are slower than float32.

    float16 needs loss scaling, so that GPUs without bfloat16 alone get it.
    """
    if multiplies_bfloat16(device):
        return "bfloat16"
    return "float16" if device.type == "cuda" and settings.takes_float16 else None


def _time_candidates(
    make_trainer: Callable[[torch.dtype], Trainer],
    half: str,
    until: float,
    say: Callable[[str], None],
) -> dict[str, _Timed]:
    """Times by dtype, of float32 and of the 16-bit one."""
    timed: dict[str, _Timed] = {}
    for name in ("float32", half):
        say(f"timing a step in {name}")
        left_s = until - time.perf_counter()
        share = until - left_s / 2 if name == "float32" else until  # half the time for each
        hopeless = _HOPELESS * min((t.first for t in timed.values()), default=math.inf)
        trainer = make_trainer(getattr(torch, name))
        timed[name] = _time_steps(trainer, share, hopeless=hopeless)
    return timed


def _probe_seconds(
    trainer: Trainer, probes: Sequence[Probe], token_s: float, until: float
) -> float:
    """Seconds of all probes: timed if there is time, else predicted from the time of a step."""
    total = 0.0
    for probe in probes:
        predicted = None if probe.tokens is None else probe.tokens * token_s * _FORWARD_SHARE
        over = predicted is not None and time.perf_counter() + predicted > until
        if predicted is not None and trainer.world.any(over):
            total += predicted
            continue
        start = time.perf_counter()
        probe.taken(trainer)
        total += time.perf_counter() - start
    return total


def _time_steps(trainer: Trainer, until: float, *, hopeless: float = math.inf) -> _Timed:
    """Times one step to warm up, then several while there is time.

    The fastest counts, so that other work on the machine for a moment does not matter. A first
    step above `hopeless` is the only one.
    """
    first = best = _step_seconds(trainer)
    if first > hopeless:
        return _Timed(first, math.inf)
    spent = 0.0
    for repeat in range(MOST_REPEATS):
        enough = repeat >= LEAST_REPEATS and spent >= ENOUGH_S
        # Every process must take the same number of steps, whatever its clock says.
        if enough or trainer.world.any(time.perf_counter() + best > until):
            break
        seconds = _step_seconds(trainer)
        spent += seconds
        best = min(best, seconds)
    return _Timed(first, best)


def _step_seconds(trainer: Trainer) -> float:
    """Seconds per optimizer step, on the slowest process."""
    return trainer.world.max(_own_step_seconds(trainer))


def _own_step_seconds(trainer: Trainer) -> float:
    """Only one microbatch is computed and its time multiplied, unless a step is more than that."""
    _wait(trainer.device)
    start = time.perf_counter()
    # A rollout serves several steps, and a pipeline overlaps its microbatches.
    if isinstance(trainer.loader, StatefulLoader) or trainer.pipeline is not None:
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
    """Best rate of a matrix multiplication in FLOP/s: the peak that mfu refers to."""
    size = 8192 if device.type == "cuda" else 1536
    if device.type == "cpu" and dtype == torch.float16:
        size = 256  # most CPUs emulate it
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
