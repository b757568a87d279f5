"""Learning-rate schedules (warm-up, then cosine, linear, wsd or PaLM's) and weight-decay rules.

All are pure functions of the step, so there is no scheduler state to save.
"""

import math

from openpalm.train.optimizer_settings import OptimSettings, given

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
    falling = steps - warmup if settings.anneal is None else round(settings.anneal * steps)
    progress = min(1.0, (step - warmup) / max(1, falling))
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


def decay_coefficient(lr: float, settings: OptimSettings) -> float:
    """The weight decay that an optimizer multiplies by the current learning rate `lr`.

    fixed is weight_decay. PaLM decays by lr^2 per step (section 5; so does T5X). nanoPALM gives
    lr^2 to AdamW, which multiplies by lr again: lr^3.
    """
    powers = {"fixed": 0, "palm": 1, "nanopalm": 2}
    return given(settings.weight_decay) * lr ** powers[settings.rule]
