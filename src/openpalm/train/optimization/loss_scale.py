"""Dynamic loss scaling: keeps gradients in float16's range (Micikevicius et al. 2018, section 3.2).

Powers of two only, so that scaling and unscaling change no digit.
"""

from typing import Any

START, FLOOR = 2.0**16, 1.0
"""The first scale, and the least: an overflow at the least scale is a step that diverges."""
GOOD_STEPS = 2000
"""Steps without an overflow after which the scale doubles."""


class LossScale:
    """The factor of the loss before the backward pass; the gradients are divided by it again.

    Every process has the same one, because the gradient's norm, which shows an overflow, is global.
    """

    def __init__(self) -> None:
        self.scale = START
        self.good_steps = 0

    def lowered(self) -> bool:
        """Halves the scale after an overflow; False if it is at its floor already."""
        self.good_steps = 0
        lowered = self.scale > FLOOR
        self.scale = max(FLOOR, self.scale / 2)
        return lowered

    def count_good_step(self) -> None:
        self.good_steps += 1
        if self.good_steps == GOOD_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for values that `state` never gives."""
        scale, good_steps = float(state["scale"]), int(state["good_steps"])
        if not (FLOOR <= scale < 2.0**64 and 0 <= good_steps < GOOD_STEPS):
            raise ValueError(f"loss_scale is {state!r}")
        self.scale, self.good_steps = scale, good_steps
