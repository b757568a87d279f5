"""Plots curves in the terminal with braille characters."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from openpalm.report.runs import (
    Axis,
    Curve,
    Run,
    axis_label,
    group_by_kind,
    loss_unit,
    read_runs,
    smooth,
)

COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red", "bright_black", "white")
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""bits of the dots of a braille character (from U+2800), by row and column"""
_UNITS = "kMGTPEZ"
_BEGINNING = 0.05
"""share at the start of a curve that may be above the plot"""


def plot(
    curves: Sequence[tuple[str, Curve]], *, title: str, x_label: str, width: int, height: int
) -> Text:
    """Plots named curves in `width` columns and `height` lines; skips empty ones."""
    curves = [(name, curve) for name, curve in curves if curve[0]]
    if not curves:
        return Text(f"{title}: nothing to draw yet\n")
    xs = [x for _, (x, _) in curves for x in x]
    ys = [y for _, (_, y) in curves for y in y[int(_BEGINNING * len(y)) :]]
    low, high = min(ys), max(ys)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    names = width // 4 if len(curves) > 1 else 0
    marks = [f"{_short(low + (high - low) * share):>8} " for share in (1.0, 0.5, 0.0)]
    columns = max(10, width - len(marks[0]) - 1 - names)
    rows = max(3, height - 3)
    left, right = min(xs), max(xs)
    cells = np.zeros((rows, columns), int)
    owners = np.full((rows, columns), -1)
    for owner, (_, (x, y)) in enumerate(curves):
        across = (np.array(x, float) - left) / ((right - left) or 1.0) * (2 * columns - 1)
        down = (high - np.array(y, float)) / (high - low) * (4 * rows - 1)
        _stroke(cells, owners, owner, across, down)
    labels = _labels([(name, (high - y[-1]) / (high - low)) for name, (_, y) in curves], rows)
    text = Text(f"{'':9}{title}\n")
    for row in range(rows):
        mark = {0: marks[0], (rows - 1) // 2: marks[1], rows - 1: marks[2]}.get(row, " " * 9)
        text.append(mark + ("┤" if mark.strip() else "│"))
        for cell, owner in zip(cells[row], owners[row], strict=True):
            text.append(chr(0x2800 + cell) if cell else " ", _colour(owner))
        if row in labels:
            owner, name = labels[row]
            text.append(f" {name}"[:names], _colour(owner))
        text.append("\n")
    text.append(f"{'':9}└{'─' * columns}\n{'':9}{_below(left, right, x_label, columns)}\n")
    return text


def _colour(owner: int) -> str:
    return COLOURS[owner % len(COLOURS)] if owner >= 0 else ""


def _stroke(
    cells: np.ndarray, owners: np.ndarray, owner: int, across: np.ndarray, down: np.ndarray
) -> None:
    """Sets the dots of a polyline inside the plot."""
    if len(across) == 1:
        across, down = np.repeat(across, 2), np.repeat(down, 2)
    for (x0, y0), (x1, y1) in pairwise(zip(across, down, strict=True)):
        dots = 1 + int(max(abs(x1 - x0), abs(y1 - y0)))
        for share in np.linspace(0.0, 1.0, dots + 1):
            x, y = round(x0 + share * (x1 - x0)), round(y0 + share * (y1 - y0))
            if 0 <= y < 4 * len(cells):
                cells[y // 4, x // 2] |= _DOTS[y % 4][x % 2]
                owners[y // 4, x // 2] = owner


def _labels(ends: list[tuple[str, float]], rows: int) -> dict[int, tuple[int, str]]:
    """Row -> curve number and name, as near to the end of its curve as possible."""
    if len(ends) < 2:
        return {}
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    placed: dict[int, tuple[int, str]] = {}
    row = -1
    for rank, i in enumerate(order):
        room = rows - (len(order) - rank)
        row = max(row + 1, min(round(ends[i][1] * (rows - 1)), room))
        placed[row] = (i, ends[i][0])
    return placed


def _below(left: float, right: float, label: str, columns: int) -> str:
    start, end = _short(left), _short(right)
    return f" {start}{label:^{max(0, columns - len(start) - len(end))}}{end}"


def _short(value: float) -> str:
    """Four digits or fewer: 0.01234, 3.142, 12.5k, 3.6P."""
    if abs(value) < 1e4:
        return f"{value:.4g}"
    power = min(len(_UNITS), int(math.log10(abs(value)) / 3))
    return f"{value / 1000**power:.3g}{_UNITS[power - 1]}"


def print_losses(runs: Sequence[Run], axis: Axis, height: int = 20) -> None:
    """Prints training and validation losses, one plot per group of comparable runs."""
    console = Console()
    for kind in group_by_kind(runs):
        for column in ("loss", "val_loss"):
            if any(run.curve(column, axis)[0] for run in kind):
                console.print(_losses(kind, column, axis, console.width, height))


def print_loss(path: Path, console: Console, height: int = 10) -> None:
    """Prints a small plot of the training loss of the run in a directory."""
    console.print(_losses(read_runs([path]), "loss", "steps", console.width, height), end="")


def _losses(runs: Sequence[Run], column: str, axis: Axis, width: int, height: int) -> Text:
    unit, curves = runs[0].unit, []
    for run in runs:
        x, y = run.curve(column, axis)
        curves.append((run.name, (x, smooth(y) if column == "loss" else y)))
    what = "training loss, smoothed" if column == "loss" else "validation loss"
    title = f"{what} ({loss_unit(unit)})"
    return plot(curves, title=title, x_label=axis_label(axis, unit), width=width, height=height)
