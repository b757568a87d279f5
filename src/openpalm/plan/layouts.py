"""Layouts: how many GPUs each kind of parallelism takes, which are possible, and the reasons.

    pipeline    the blocks are cut into stages
    replicate   data parallel: every replica holds the whole state (HSDP with shard > 1)
    shard       data parallel: the state is cut into shards (FSDP)
    context     the sequence is cut; the state is sharded over these GPUs, too
    tensor      heads, feed-forward and vocabulary are cut

Their product is the number of GPUs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from openpalm.errors import SettingsError
from openpalm.model.config import ModelConfig
from openpalm.parallel.config import AXES, Axes, divisors

OPTIONS = {axis: f"--{axis}" for axis in AXES} | {"context": "--context-parallel"}
MOST_LISTED = 12


@dataclass(frozen=True)
class Layout(Axes):
    """GPUs on each axis."""

    @property
    def by_axis(self) -> dict[str, int]:
        """GPUs by axis, in the order of AXES."""
        return dict(zip(AXES, self.sizes, strict=True))

    @property
    def shards(self) -> int:
        """Parts into which FSDP cuts weights, gradients and moments."""
        return self.shard * self.context

    @property
    def gathers(self) -> bool:
        """Whether FSDP gathers and reduces the weights of each block."""
        return self.averaged > 1

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours on an axis; tensor ranks are adjacent."""
        return math.prod(self.sizes[AXES.index(axis) + 1 :])


def layouts(gpus: int, fixed: dict[str, int]) -> Iterator[Layout]:
    """Every layout of so many GPUs with these sizes on the axes that are fixed."""

    def extend(chosen: tuple[int, ...], left: int) -> Iterator[Layout]:
        if len(chosen) == len(AXES):
            if left == 1:
                yield Layout(*chosen)
            return
        given = fixed.get(AXES[len(chosen)])
        for size in divisors(left) if given is None else [given]:
            if left % size == 0:
                yield from extend((*chosen, size), left // size)

    return extend((), gpus)


def refusal(layout: Layout, config: ModelConfig, context: int) -> str | None:
    """The reason why the model cannot be cut so, or None."""
    t, p, c = layout.tensor, layout.pipeline, layout.context
    # The vocabulary is padded to a multiple of the ranks, so it never refuses.
    if config.heads % t or config.ff_dim % t:
        both = math.gcd(config.heads, config.ff_dim)
        return _must_divide(
            "tensor", t, f"heads and ff_dim ({config.heads}, {config.ff_dim})", both
        )
    # Key/value heads that do not divide are replicated; of those that do, each rank has its own.
    if p > config.depth:
        return f"pipeline ({p}) must be at most depth ({config.depth})"
    if context % (2 * c) and c > 1:
        return (
            f"2 x context-parallel (2 x {c}) must divide the sequence ({context} tokens): each "
            "rank takes one chunk from both ends"
        )
    if context % t:  # sequence parallel
        return _must_divide("tensor", t, f"the sequence ({context} tokens)", context)
    return None


def _must_divide(axis: str, size: int, what: str, number: int) -> str:
    possible = [n for n in divisors(number) if n <= max(64, size)]
    return f"{axis} ({size}) must divide {what}; use {_either(possible)}"


def _either(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers[:MOST_LISTED]]
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]


def possible_layouts(
    gpus: int, config: ModelConfig, context: int, fixed: dict[str, int]
) -> list[Layout]:
    """The layouts that fit the model.

    Raises SettingsError if there is none: with the reason for the fixed axes, and with what is
    possible on them.
    """
    found = list(layouts(gpus, fixed))
    possible = [layout for layout in found if refusal(layout, config, context) is None]
    if possible:
        return possible
    options = ", ".join(f"{OPTIONS[axis]} {size}" for axis, size in fixed.items())
    if found:
        reason = refusal(found[0], config, context)
        raise SettingsError(f"{options or f'--gpus {gpus}'}: {reason}")
    product = math.prod(fixed.values())
    reason = f"their product ({product}) must divide --gpus ({gpus})"
    if len(fixed) == 1:
        reason = f"must divide --gpus ({gpus})"
    elif len(fixed) == len(AXES):
        reason = f"their product ({product}) must be --gpus ({gpus})"
    raise SettingsError(f"{options}: {reason}; {_listed(gpus, config, context, fixed)}")


def _listed(gpus: int, config: ModelConfig, context: int, fixed: dict[str, int]) -> str:
    """The sizes that each fixed axis may have, the others being free."""
    free = [x for x in layouts(gpus, {}) if refusal(x, config, context) is None]
    return ", ".join(
        f"{OPTIONS[axis]} may be {_either(sorted({getattr(x, axis) for x in free}))}"
        for axis in fixed
    )
