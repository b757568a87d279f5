"""Learning-rate schedules: warm-up, then cosine, linear, wsd (warm-up, stable, decay) or PaLM's.

The learning rate is a pure function of the step, so there is no scheduler state to save.
"""

import math

from openpalm.train.optimizer_settings import OptimSettings

PALM_HOLD = 10_000 / 255_000
"""Share of its steps for which PaLM kept the learning rate constant (section 5)."""


def learning_rate_factor(step: int, steps: int, settings: OptimSettings) -> float:
    """The learning rate at `step` (from 1) of `steps`, as a share of the peak.

    palm is PaLM's min(1, sqrt(h / step)) with h = 10,000, here as a share of the run.
    """
    if steps == 1:
        return 1.0  # a schedule that ends at zero would leave the only step without an update
    warmup = round(settings.warm * steps)
    if step <= warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    match settings.schedule:
        case "palm":
            return min(1.0, (max(1, warmup, PALM_HOLD * steps) / step) ** 0.5)
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            share = 1 - progress
        case "wsd":
            falling = round(settings.cooldown * steps)
            share = min(1.0, max(0, steps - step) / falling) if falling else 1.0
    return settings.final_lr + (1 - settings.final_lr) * share
