"""`openpalm plan`: memory, step time, MFU, days and cost of a training, and the layouts ranked."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpalm.base.settings import check, check_field, parse
from openpalm.train.optimizer_settings import OptimizerName

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from openpalm.model.config import ModelConfig
    from openpalm.plan.ranking import Goal, Plan

WIDE_ENOUGH = 100
"""Columns of a terminal that show every column of the table."""
MOST_REASONS = 3
TOKENS_PER_PARAMETER = 20
"""Default length of a run (Hoffmann et al. 2022)."""


@dataclass(frozen=True)
class PlanSettings:
    """The model, the machines and the run; a layout axis that is given is fixed."""

    model: str
    """size of the model, see `openpalm models`; or a run, checkpoint or hub name"""
    gpus: int = 1
    """number of GPUs"""
    gpu: str = "h100"
    """h100, h200, a100, a100-40gb, l40s, rtx4090, v100, t4, tpu-v4; cpu measures this machine"""
    tokens: float | None = None
    """tokens of the run, such as 160e9; default: 20 a parameter"""
    context: int | None = None
    """tokens per sequence; default: the model's"""
    batch_tokens: int | None = None
    """tokens per step; default: 16 sequences a GPU, but at most 4M tokens or a sequence a GPU"""
    microbatch_tokens: int = 8192
    """tokens per forward pass of a data-parallel rank, one sequence at least"""
    optimizer: OptimizerName = "adamw"
    """optimizer"""
    recompute: Literal["none", "selective", "full", "offload"] | None = None
    """activations recomputed in the backward pass, as --memory.recompute of `train`; default: for
    each layout the least that fits"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """number format of the arithmetic; default: bfloat16 if the GPU has it"""
    lora_rank: int = 0
    """rank of a LoRA adapter of every matrix; 0 trains the weights"""
    replicate: int | None = None
    """data-parallel replicas of the whole state"""
    shard: int | None = None
    """data-parallel ranks among which the state is sharded (FSDP)"""
    tensor: int | None = None
    """tensor-parallel ranks"""
    pipeline: int | None = None
    """pipeline stages"""
    context_parallel: int | None = None
    """ranks that share each sequence"""
    stages_per_rank: int = 1
    """stages of the pipeline on each rank (interleaved schedule)"""
    cost_per_gpu_hour: float | None = None
    """price of a GPU for an hour; default: no cost is printed"""
    tokens_per_s: float | None = None
    """measured tokens per second of all GPUs: prints its MFU, days and cost, and no layouts"""
    top: int = 8
    """number of layouts to list"""
    json: bool = False
    """print JSON"""

    def __post_init__(self) -> None:
        axes = ("replicate", "shard", "tensor", "pipeline", "context_parallel")
        whole = ("gpus", "context", "batch_tokens", "microbatch_tokens", "stages_per_rank", "top")
        for name in (*axes, *whole):
            check_field(self, name, lambda v: 1 <= v < 1 << 50, "1 or more")
        for name in ("tokens", "cost_per_gpu_hour", "tokens_per_s"):
            check_field(self, name, lambda v: 0 < v < 1e30, "above 0")
        check(self.gpus <= 1 << 20, "gpus", self.gpus, f"at most {1 << 20}")
        check(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 or more")

    @property
    def fixed(self) -> dict[str, int]:
        """Sizes of the axes that are given."""
        given = {name: getattr(self, name) for name in ("replicate", "shard", "tensor", "pipeline")}
        given["context"] = self.context_parallel
        return {axis: size for axis, size in given.items() if size is not None}


def run(argv: Sequence[str]) -> None:
    settings = parse(
        PlanSettings,
        argv,
        verb="plan",
        about="Computes memory, step time, MFU, days and cost of a training for every layout of "
        "the GPUs, and ranks the layouts. Layouts that do not fit come last, with what would make "
        "them fit. It trains nothing and needs no GPU.",
        examples=[
            "openpalm plan --model palm-8b --gpus 64 --gpu h100 --tokens 160e9",
            "openpalm plan --model palm-8b --gpus 64 --gpu h100 --context 8192 --tensor 4",
            "openpalm plan --model palm-1b --gpu rtx4090 --recompute full --optimizer muon",
            "openpalm plan --model palm-14m --gpu cpu --cost-per-gpu-hour 0.1",
            "openpalm plan --model palm-540b --gpus 6144 --gpu tpu-v4 --tokens-per-s 238300",
        ],
    )
    goal = _goal(settings)
    if settings.tokens_per_s is not None:
        _print_rate(settings, goal, settings.tokens_per_s)
        return
    from openpalm.plan.ranking import ranked

    plans = ranked(goal, settings.fixed, settings.recompute)
    if settings.json:
        _print_json(settings, goal, plans[: settings.top])
        return
    from rich.console import Console

    # Redirected output has 80 columns at least, and no more than a terminal's.
    console = Console(width=min(WIDE_ENOUGH, max(80, Console().width)), highlight=False)
    console.print(_header(settings, goal))
    _print_best(plans[0], console)
    console.print()
    console.print(_layouts(plans[: settings.top], console.width))
    _print_unfit(plans, settings.top, console)


def _goal(settings: PlanSettings) -> "Goal":
    from openpalm.model.config import LoraConfig
    from openpalm.plan.devices import device_named
    from openpalm.plan.ranking import Goal, default_batch_tokens
    from openpalm.plan.training import Training

    config = _config(settings.model)
    dtype = settings.dtype or _default_dtype(settings.gpu)
    device = device_named(settings.gpu, dtype, lambda line: print(line, file=sys.stderr))
    device.flops(dtype)
    context, lora = settings.context or config.context, None
    if settings.lora_rank:
        lora = LoraConfig(settings.lora_rank, 32.0, tuple(config.matrices))
        lora.check(config)
    training = Training(config, context, 1, 1, settings.optimizer, dtype, lora=lora)
    return Goal(
        training,
        settings.gpus,
        device,
        tokens=settings.tokens or TOKENS_PER_PARAMETER * config.parameters,
        batch_tokens=settings.batch_tokens or default_batch_tokens(context, settings.gpus),
        microbatch_tokens=settings.microbatch_tokens,
        chunks=settings.stages_per_rank,
        cost_per_gpu_hour=settings.cost_per_gpu_hour,
    )


def _config(name: str) -> "ModelConfig":
    """The config of a preset, or of a run, checkpoint or hub name."""
    from openpalm.model.config import PRESETS, preset

    if name in PRESETS or not (Path(name).exists() or ":" in name or "/" in name):
        return preset(name).config
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import weights_path

    return checkpoint.load_config(checkpoint.resolve(weights_path(name)))


def _default_dtype(gpu: str) -> Literal["bfloat16", "float32"]:
    from openpalm.plan.devices import DEVICES

    if gpu == "cpu":
        from openpalm.base.device import multiplies_bfloat16

        return "bfloat16" if multiplies_bfloat16() else "float32"
    known = DEVICES.get(gpu)
    return "float32" if known is not None and "bfloat16" not in known.peak else "bfloat16"


def _print_rate(settings: PlanSettings, goal: "Goal", tokens_per_s: float) -> None:
    """MFU, days and cost of a measured throughput."""
    import json

    from openpalm.plan.ranking import DAY_S, cost
    from openpalm.plan.time import mfu

    training = goal.training
    peak = goal.device.flops(training.dtype)
    share = None  # of an adapter: see Plan.mfu
    if training.lora is None:
        share = mfu(training.config, training.context, tokens_per_s, goal.gpus, peak)
    days = goal.tokens / tokens_per_s / DAY_S
    price = cost(goal, days)
    if settings.json:
        print(json.dumps({"mfu": share, "days": days, "cost": price}, indent=1))
        return
    print(_header(settings, goal))
    said = "" if share is None else f"{share:.1%} MFU, "
    print(f"{tokens_per_s:,.0f} tokens/s: {said}{_duration(days)}{_price(price)}")


def _print_json(settings: PlanSettings, goal: "Goal", plans: "list[Plan]") -> None:
    import json

    training = goal.training
    facts = {
        "model": settings.model,
        "parameters": training.config.parameters,
        "gpus": goal.gpus,
        "gpu": goal.device.name,
        "usable_memory_bytes": goal.device.usable,
        "peak_flops": goal.device.flops(training.dtype),
        "context": training.context,
        "batch_tokens": goal.batch_tokens,
        "tokens": goal.tokens,
        "optimizer": training.optimizer,
        "dtype": training.dtype,
    }
    print(json.dumps(facts | {"plans": [plan.as_json() for plan in plans]}, indent=1))


def _header(settings: PlanSettings, goal: "Goal") -> str:
    from openpalm.plan.devices import GIB

    training, device = goal.training, goal.device
    steps = -(-goal.tokens // goal.batch_tokens)
    return (
        f"{settings.model}: {training.config.parameters:,} parameters, {_amount(goal.tokens)} "
        f"tokens in {steps:,.0f} steps of {goal.batch_tokens:,}\n"
        f"{goal.gpus:,} x {device.name}: {device.usable / GIB:.3g} GiB for tensors, "
        f"{device.flops(training.dtype) / 1e12:,.3g} TFLOP/s in {training.dtype}\n"
        f"sequences of {training.context:,} tokens, {training.optimizer}"
    )


def _print_best(plan: "Plan", console: "Console") -> None:
    """The first layout with its memory and its step by part."""
    from rich.table import Table

    from openpalm.errors import count_of
    from openpalm.plan.devices import GIB

    rows = count_of(plan.training.rows, "sequence")
    microbatches = count_of(plan.training.accumulation, "microbatch").replace("hs", "hes")
    console.print(
        f"\n{'' if plan.fits else 'does not fit: '}[bold]{plan.layout}[/], recompute "
        f"{plan.training.recompute}, {microbatches} of {rows}"
    )
    memory = _parts(f"memory a GPU ({plan.memory.moment})", "GiB")
    for name, size in plan.memory.parts.items():
        if size:
            memory.add_row(name, f"{size / GIB:,.2f}")
    memory.add_row("[bold]total[/]", f"[bold]{plan.memory.total / GIB:,.2f}[/]")
    step = _parts("step", "s")
    for name, seconds in plan.time.parts.items():
        if seconds:
            step.add_row(name, f"{seconds:,.3f}")
    step.add_row("[bold]total[/]", f"[bold]{plan.time.total:,.3f}[/]")
    side_by_side = Table.grid(padding=(0, 6))
    side_by_side.add_row(memory, step)
    console.print(side_by_side)


def _parts(title: str, unit: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    table.add_column(unit, justify="right")
    return table


def _layouts(plans: "list[Plan]", width: int) -> "Table":
    """A row for each layout."""
    from rich.table import Table

    from openpalm.plan.devices import GIB

    columns: dict[str, Callable[[Plan], str]] = {
        "recompute": lambda plan: plan.training.recompute,
        "GiB": lambda plan: f"{plan.memory.total / GIB:,.1f}",
        "step s": lambda plan: f"{plan.time.total:,.3g}",
        "tokens/s": lambda plan: f"{plan.tokens_per_s:,.0f}",
        "MFU": lambda plan: "-" if plan.mfu is None else f"{plan.mfu:.1%}",
        "time": lambda plan: _duration(plan.days),
        "cost": lambda plan: f"{plan.cost or 0:,.0f}",
    }
    if plans[0].cost is None:
        del columns["cost"]
    if width < WIDE_ENOUGH:
        del columns["step s"]
    table = Table(box=None, pad_edge=False, width=width, collapse_padding=True)
    table.add_column("layout", ratio=1)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        cells = [cell(plan) for cell in columns.values()]
        table.add_row(str(plan.layout), *cells, style=None if plan.fits else "dim")
    return table


def _print_unfit(plans: "list[Plan]", top: int, console: "Console") -> None:
    """Why the layouts that come closest do not fit."""
    from textwrap import fill

    from openpalm.plan.ranking import reason

    unfit = [plan for plan in plans if not plan.fits]
    if not unfit:
        return
    count = f"{len(unfit):,} of {len(plans):,} layouts do not fit"
    console.print(f"\n{count}:")
    listed = [plan for plan in plans[:top] if not plan.fits]
    for plan in listed[:MOST_REASONS] or unfit[:1]:
        line = f"  {plan.layout}: {reason(plan, plans)}"
        console.print(fill(line, console.width, subsequent_indent=" " * 4, break_on_hyphens=False))


def _amount(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.3g}{unit}"
    return f"{number:,.0f}"


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    hours = 24 * days
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _price(cost: float | None) -> str:
    return "" if cost is None else f", cost {cost:,.0f}"
