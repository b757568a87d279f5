"""Learning curves as inline SVG, of one run or of several.

Colours are Tol's muted scheme for colour-blind readers (Tol 2021, "Colour Schemes",
SRON/EPS/TN/09-002), some darker. From the fifth line on, lines are dashed; each line ends with its
number.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpalm.report.runs import Axis, Run, axis_label, loss_unit, smooth

COLOURS = (
    *("#332288", "#CC6677", "#117733", "#3399CC"),
    *("#882255", "#8A8A00", "#2F8F7F", "#AA4499"),
)
DASHES = ("", "6 2", "2 1.5", "6 2 2 2")
"""for lines 1 to 4, 5 to 8 and so on: lengths of dash and gap in points"""
_MOST_POINTS = 500
_BEGINNING = 0.05
"""share at the start of a curve that may be above the figure"""


@dataclass(frozen=True)
class Line:
    """One line of a figure: a run, or several that differ only in their seed."""

    number: int
    runs: list[Run]

    @property
    def colour(self) -> str:
        return COLOURS[(self.number - 1) % len(COLOURS)]

    @property
    def dashes(self) -> str:
        return DASHES[(self.number - 1) // 4 % len(DASHES)]


@dataclass(frozen=True)
class Panel:
    """The content of one pair of axes."""

    column: str
    title: str
    smoothed: bool = False
    marked: bool = False
    """draw a dot at each value"""
    from_zero: bool = False


def comparison(lines: Sequence[Line], panels: Sequence[Panel], axis: Axis, label: str) -> str:
    """A figure with two panels per row, as HTML."""
    rows = math.ceil(len(panels) / 2)
    figure, grid = _figure(rows, min(2, len(panels)))
    for axes, panel in zip(grid, panels, strict=False):
        ends, tops = [], []
        for line in lines:
            x, low, mean, high = _band([_points(run, panel, axis) for run in line.runs])
            if not len(x):
                continue
            _draw(axes, line, panel, x, mean)
            if len(line.runs) > 1:
                axes.fill_between(x, low, high, color=line.colour, alpha=0.18, linewidth=0)
            ends.append((x[-1], mean[-1], line))
            tops.append((low.min(), high[int(_BEGINNING * len(high)) :].max()))
        unit = lines[0].runs[0].unit
        axes.set(xlabel=axis_label(axis, unit), title=panel.title)
        if axis != "minutes":
            axes.xaxis.set_major_formatter(_engineering())
        _limit(axes, panel, tops)
        _number(axes, ends)
    for axes in grid[len(panels) :]:
        axes.remove()
    return svg(figure, label)


def _points(run: Run, panel: Panel, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    x, y = run.curve(panel.column, axis)
    y = smooth(y) if panel.smoothed else y
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int))
    return np.array(x, float)[kept], np.array(y, float)[kept]


def _band(
    curves: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, minimum, mean and maximum of several curves, on their common range."""
    curves = [curve for curve in curves if len(curve[0])]
    if len(curves) < 2:
        x, y = curves[0] if curves else (np.empty(0), np.empty(0))
        return x, y, y, y
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    x = curves[0][0]
    x = np.unique(np.clip(x, first, last)) if first <= last else np.empty(0)
    stack = np.stack([np.interp(x, *curve) for curve in curves])
    return x, stack.min(0), stack.mean(0), stack.max(0)


def _draw(axes: Any, line: Line, panel: Panel, x: np.ndarray, y: np.ndarray) -> None:
    pattern = tuple(map(float, line.dashes.split()))
    style = (0, pattern) if pattern else "solid"
    marker = {"marker": "o", "markersize": 3} if panel.marked or len(x) == 1 else {}
    axes.plot(x, y, color=line.colour, linestyle=style, linewidth=1.5, **marker)


def _limit(axes: Any, panel: Panel, tops: list[tuple[float, float]]) -> None:
    """Sets the y range without the first steps, whose large losses would flatten the rest."""
    if panel.from_zero:
        axes.set_ylim(0, None)
    elif panel.smoothed and tops:
        low, high = min(low for low, _ in tops), max(high for _, high in tops)
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def _number(axes: Any, ends: list[tuple[float, float, Line]], apart: float = 0.065) -> None:
    """Writes each line's number to the right of its end, without overlaps."""
    low, high = axes.get_ylim()
    place = -math.inf
    heights: list[tuple[float, Line]] = []
    for _, y, line in sorted(ends, key=lambda end: end[1]):
        place = max((y - low) / (high - low), place + apart)
        heights.append((place, line))
    over = max(0.0, place - 1.0)
    for height, line in heights:
        at = (1.015, height - over)
        axes.annotate(
            str(line.number),
            at,
            xycoords="axes fraction",
            color=line.colour,
            weight="bold",
            va="center",
        )


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def learning(run: Run) -> str:
    """Loss and throughput of one run against steps."""
    figure, (loss, speed) = _figure(1, 2, width_ratios=[2, 1])
    x, y = run.curve("loss", "steps")
    loss.plot(x, y, color="#9ecbff", linewidth=0.8, label="training, each step")
    loss.plot(x, smooth(y), color="#0550ae", label="training, smoothed")
    _dots(loss, run, "val_loss", "validation")
    loss.set(xlabel="step", ylabel=f"loss ({loss_unit(run.unit)})")
    loss.legend(frameon=False)
    speed.plot(*run.curve(f"{run.unit}_per_s", "steps"), color="#57606a")
    speed.set(xlabel="step", ylabel=f"{run.unit} per second", ylim=(0, None))
    return svg(figure, "Loss and throughput against steps")


def rewards(run: Run) -> str:
    """Rewards and distance to the reference of a PPO or GRPO run."""
    figure, (reward, distance) = _figure(1, 2, width_ratios=[2, 1])
    x, y = run.curve("reward", "steps")
    reward.plot(x, y, color="#9ecbff", linewidth=0.8, label="rollouts")
    reward.plot(x, smooth(y), color="#0550ae", label="rollouts, smoothed")
    _dots(reward, run, "val_reward", "held-out completions")
    _dots(reward, run, "val_gold", "held-out completions, gold", color="#1a7f37")
    reward.set(xlabel="step", ylabel="mean reward")
    reward.legend(frameon=False)
    _dots(distance, run, "val_kl", "held-out completions")
    distance.set(xlabel="step", ylabel="nats from the reference")
    return svg(figure, "Reward and distance to the reference against steps")


def _dots(axes: Any, run: Run, column: str, label: str, color: str = "#bc4c00") -> None:
    x, y = run.curve(column, "steps")
    if x:
        axes.plot(x, y, "o-", color=color, label=label)


def _figure(rows: int, columns: int, width_ratios: list[int] | None = None) -> tuple[Any, Any]:
    """A figure and its axes in row order."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(rows, columns, width_ratios=width_ratios, squeeze=False).flat


def svg(figure: Any, label: str) -> str:
    """The figure as HTML."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    return f'<figure role="img" aria-label="{label}">{drawn[drawn.index("<svg") :]}</figure>'
