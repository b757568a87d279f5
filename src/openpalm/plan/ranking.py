"""Plans: every possible layout with its memory, time, MFU, days and cost, the best first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from openpalm.errors import SettingsError
from openpalm.plan.devices import GIB, Device
from openpalm.plan.layouts import Layout, possible_layouts
from openpalm.plan.memory import Memory, step_memory
from openpalm.plan.time import StepTime, mfu, step_time
from openpalm.plan.training import RECOMPUTE, Recompute, Training, cut_batch

DAY_S = 86400
MOST_DOUBLINGS = 13
"""Of the shards, when looking for a number of GPUs that is enough."""
SEQUENCES_PER_GPU, MOST_BATCH_TOKENS = 16, 1 << 22
"""Default batch: 16 sequences a GPU, but at most 4M tokens (PaLM's largest batch), or a sequence a
GPU."""


@dataclass(frozen=True)
class Goal:
    """What is to be trained, on what."""

    training: Training
    """rows and microbatches are of one process; a layout cuts the batch"""
    gpus: int
    device: Device
    tokens: float
    """tokens of the whole run"""
    batch_tokens: int
    microbatch_tokens: int
    chunks: int = 1
    """stages per rank of a pipeline (interleaved schedule)"""
    cost_per_gpu_hour: float | None = None


@dataclass(frozen=True)
class Plan:
    """One layout."""

    layout: Layout
    training: Training
    memory: Memory
    time: StepTime
    goal: Goal

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.goal.device.usable

    @property
    def tokens_per_s(self) -> float:
        return self.goal.batch_tokens / self.time.total

    @property
    def mfu(self) -> float | None:
        """None for an adapter, as in a run: its definition counts a gradient of every weight."""
        if self.training.lora is not None:
            return None
        peak = self.goal.device.flops(self.training.dtype)
        training = self.training
        rate = self.tokens_per_s
        return mfu(training.config, training.context, rate, self.goal.gpus, peak)

    @property
    def days(self) -> float:
        return self.goal.tokens / self.tokens_per_s / DAY_S

    @property
    def cost(self) -> float | None:
        return cost(self.goal, self.days)

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.by_axis,
            "recompute": self.training.recompute,
            "microbatch_sequences": self.training.rows,
            "microbatches": self.training.accumulation,
            "fits": self.fits,
            "memory_bytes": self.memory.parts | {"total": self.memory.total},
            "memory_peak_at": self.memory.moment,
            "step_s": self.time.parts | {"total": self.time.total},
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "days": self.days,
            "cost": self.cost,
        }


def cost(goal: Goal, days: float) -> float | None:
    """Price of so many days, if a price is given."""
    if goal.cost_per_gpu_hour is None:
        return None
    return days * 24 * goal.gpus * goal.cost_per_gpu_hour


def default_batch_tokens(context: int, gpus: int) -> int:
    per_gpu = MOST_BATCH_TOKENS // (context * gpus)
    return context * gpus * max(1, min(SEQUENCES_PER_GPU, per_gpu))


def ranked(goal: Goal, fixed: dict[str, int], recompute: Recompute | None) -> list[Plan]:
    """The plans: those that fit by speed, then the others by the memory that they lack.

    recompute: None takes for each layout the least recomputation that fits. Raises SettingsError
    if no layout is possible, with the reason.
    """
    config, context = goal.training.config, goal.training.context
    plans, refused = [], []
    for layout in possible_layouts(goal.gpus, config, context, fixed):
        try:
            plans.append(_plan(goal, layout, recompute))
        except SettingsError as error:
            refused.append(error)
    if not plans:
        raise refused[0]
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[bool, float, int]:
    """Speed to three digits: of equally fast layouts the one with the fewest axes is first."""
    axes = sum(size > 1 for size in plan.layout.sizes)
    if not plan.fits:
        return True, plan.memory.total, axes
    return False, -float(f"{plan.tokens_per_s:.3g}"), axes


def _plan(goal: Goal, layout: Layout, recompute: Recompute | None) -> Plan:
    cut = cut_batch(
        goal.training,
        layout,
        batch_tokens=goal.batch_tokens,
        microbatch_tokens=goal.microbatch_tokens,
    )
    plan = None
    for way in RECOMPUTE[:3] if recompute is None else (recompute,):
        training = replace(cut, recompute=way)
        memory = step_memory(training, layout, cuda=goal.device.cuda)
        if plan is None or memory.total < plan.memory.total:
            time = step_time(training, layout, goal.device, chunks=goal.chunks)
            plan = Plan(layout, training, memory, time, goal)
        if plan.fits:
            break
    assert plan is not None
    return plan


def reason(plan: Plan, plans: list[Plan]) -> str:
    """Why a plan does not fit, and what would make it fit."""
    needs, has = plan.memory.total / GIB, plan.goal.device.usable / GIB
    largest = max(plan.memory.parts.items(), key=lambda part: part[1])[0]
    remedy = next(_remedies(plan, plans), "take a GPU with more memory")
    return f"needs {needs:,.1f} of {has:,.1f} GiB, most for {largest}; {remedy}"


def _remedies(plan: Plan, plans: list[Plan]) -> Iterator[str]:
    """Changes after which this layout, or one near it, fits."""
    device, training = plan.goal.device, plan.training
    for way in RECOMPUTE[RECOMPUTE.index(training.recompute) + 1 :]:
        changed = replace(training, recompute=way)
        if step_memory(changed, plan.layout, cuda=device.cuda).total <= device.usable:
            yield f"--recompute {way} fits"
    if training.rows > 1:
        changed = replace(training, rows=1, accumulation=training.accumulation * training.rows)
        if step_memory(changed, plan.layout, cuda=device.cuda).total <= device.usable:
            yield f"--microbatch-tokens {training.context} fits"
    fitting = [other.layout for other in plans if other.fits]
    for axis in ("shard", "tensor", "pipeline", "context"):
        size = plan.layout.by_axis[axis]
        more = [x for x in fitting if x.by_axis[axis] > size]
        if more:
            yield f"{axis} {min(x.by_axis[axis] for x in more)} or more fits"
    yield from _more_gpus(plan)


def _more_gpus(plan: Plan) -> Iterator[str]:
    """The number of GPUs on which more shards of this layout fit."""
    for factor in (2**n for n in range(1, MOST_DOUBLINGS)):
        layout = replace(plan.layout, shard=plan.layout.shard * factor)
        training = replace(plan.training, rows=1)
        if step_memory(training, layout, cuda=True).total <= plan.goal.device.usable:
            yield f"shard {layout.shard} fits, on {layout.size:,} GPUs"
            return
