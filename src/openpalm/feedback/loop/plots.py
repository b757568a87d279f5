"""Plots of figures as SVG marks: positions only, which a template renders.

Colours and strokes are classes of the style sheet, so that no style is in the page itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 440.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 12.0, 12.0, 40.0
"""margins for the axes' numbers and names"""


@dataclass(frozen=True)
class Mark:
    """One SVG element: its name, its class, its numbers, and the text of a text."""

    shape: str
    css: str
    numbers: Mapping[str, str]
    text: str = ""


@dataclass
class Plot:
    """Marks in a box of `width` by `height`. `title` describes it in words."""

    title: str
    width: float = WIDTH
    height: float = HEIGHT
    is_bar: bool = False
    """stretched to the width of its place; has no text"""
    marks: list[Mark] = field(default_factory=list)

    def add(self, shape: str, css: str, text: str = "", **numbers: float | str) -> None:
        plain = {
            name.replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}"
            for name, value in numbers.items()
        }
        self.marks.append(Mark(shape, css, plain, text))

    def line(self, css: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start)


def interval(
    figure: Mapping[str, Any] | None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    references: Sequence[float] = (0.5,),
    unit: str = "%",
) -> Plot | None:
    """A figure's dot and interval on a line from `low` to `high`; None without a figure."""
    if not figure or figure.get("value") is None:
        return None
    ends = [figure.get(name) for name in ("low", "high")]
    plot = Plot(in_words(figure, unit), 100.0, 10.0, is_bar=True)
    x = Scale(low, high, 1.0, 99.0)
    plot.line("gridline", 1.0, 5.0, 99.0, 5.0)
    for reference in references:
        if low <= reference <= high:
            plot.line("reference", x(reference), 0.0, x(reference), 10.0)
    if ends[0] is not None and ends[1] is not None:
        plot.line("interval", x(ends[0]), 5.0, x(ends[1]), 5.0)
    # A line of no length with round ends stays a circle when the box is stretched.
    plot.line("point", x(figure["value"]), 5.0, x(figure["value"]), 5.0)
    return plot


def in_words(figure: Mapping[str, Any] | None, unit: str = "%") -> str:
    """Such as "71.2 % (65.0 to 76.8)"."""
    if not figure or figure.get("value") is None:
        return "undefined"
    factor, digits, sign = (100, 1, " %") if unit == "%" else (1, 2, "")
    value: float = figure["value"]
    low, high = figure.get("low"), figure.get("high")
    shown = f"{value * factor:.{digits}f}{sign}"
    if low is None or high is None:
        return f"{shown} (no interval)"
    return f"{shown} ({low * factor:.{digits}f} to {high * factor:.{digits}f})"


def span(figures: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """A scale's ends that hold all figures with their intervals, and 0."""
    values = [0.0]
    for figure in figures:
        values += [v for k in ("value", "low", "high") if (v := figure.get(k)) is not None]
    margin = (max(values) - min(values)) * 0.05 or 1.0
    return min(values) - margin, max(values) + margin


def calibration(bins: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Share of people who agreed with the model against its confidence; None without judgements."""
    full = [one for one in bins if one.get("judgements") and one.get("agreement")]
    if not full:
        return None
    most = max(one["judgements"] for one in full)
    seen = (
        f"confidence {one['mean_confidence']:.0%}, agreed {one['agreement']['value']:.0%}"
        for one in full
    )
    plot = Plot(f"Calibration: {'; '.join(seen)}")
    x, y = _box(plot, (0.5, 1.0), (0.0, 1.0), "the model's confidence", percent=True)
    plot.line("reference", x(0.5), y(0.5), x(1.0), y(1.0))
    for one in full:
        at, share = x(one["mean_confidence"]), one["agreement"]
        height = 28 * one["judgements"] / most
        plot.add(
            "rect",
            "area",
            x=x(one["low"]) + 1,
            y=y(0.0) - height,
            width=max(1.0, x(one["high"]) - x(one["low"]) - 2),
            height=height,
        )
        plot.line("interval", at, y(share["low"]), at, y(share["high"]))
        plot.add("circle", "dot", cx=at, cy=y(share["value"]), r=4.0)
    return plot


def curve(points: Sequence[Sequence[float]], name: str) -> Plot | None:
    """A line through [step, value] points; None with fewer than two."""
    kept = [(float(p[0]), float(p[1])) for p in points if len(p) == 2 and p[1] is not None]
    if len(kept) < 2:
        return None
    steps, values = [p[0] for p in kept], [p[1] for p in kept]
    margin = (max(values) - min(values)) * 0.06 or abs(values[0]) * 0.1 or 1.0
    plot = Plot(f"{name} from {values[0]:.3g} at step {steps[0]:g} to {values[-1]:.3g}")
    bounds = min(values) - margin, max(values) + margin
    x, y = _box(plot, (min(steps), max(max(steps), min(steps) + 1)), bounds, "step")
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in kept)
    plot.add("polyline", "line", points=path)
    return plot


def _box(
    plot: Plot,
    across: tuple[float, float],
    up: tuple[float, float],
    name: str,
    *,
    percent: bool = False,
) -> tuple[Scale, Scale]:
    """Draws axes with numbers; returns their scales."""
    x = Scale(*across, LEFT, plot.width - RIGHT)
    y = Scale(*up, plot.height - BOTTOM, TOP)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = up[0] + share * (up[1] - up[0])
        plot.line("gridline", LEFT, y(value), plot.width - RIGHT, y(value))
        text = f"{value:.0%}" if percent else f"{value:.3g}"
        plot.add("text", "", text, x=LEFT - 6, y=y(value) + 4, text_anchor="end")
        value = across[0] + share * (across[1] - across[0])
        text = f"{value:.0%}" if percent else f"{value:.0f}"
        if percent or share in (0.0, 0.5, 1.0):
            anchor = "end" if share == 1.0 else "middle"
            plot.add("text", "", text, x=x(value), y=y(up[0]) + 16, text_anchor=anchor)
    plot.line("axis", LEFT, y(up[0]), plot.width - RIGHT, y(up[0]))
    middle = (LEFT + plot.width - RIGHT) / 2
    plot.add("text", "", name, x=middle, y=plot.height - 6, text_anchor="middle")
    return x, y
