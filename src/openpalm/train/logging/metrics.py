"""Metrics files (.jsonl rows per step) and the progress bar of a run."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from openpalm.base import jsonl
from openpalm.base.files import sync
from openpalm.base.progress_bar import ProgressBar


class RowFile:
    """A .jsonl file that is appended to; a resumed run cuts it back to its checkpoint."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        """Appends a row and returns it; nan and inf, which JSON does not have, become null."""
        row = {name: _json_number(value) for name, value in row.items()}
        jsonl.append_row(self.path, row)
        return row

    def cut_after(self, step: int) -> None:
        """Removes rows after `step` and an incomplete last line, in one rename."""
        if self.path.exists():
            rows = read_rows(self.path)
            jsonl.write_rows(self.path, (row for row in rows if row["step"] <= step))

    def sync(self) -> None:
        """Forces the rows to disk; a checkpoint must not be newer than its rows."""
        if self.path.exists():
            sync(self.path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; skips lines that a killed process left incomplete."""
    return [row for row in jsonl.read_rows(path) if isinstance(row.get("step"), int)]


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TrainingBar(ProgressBar):
    """Progress of a run: a bar in a terminal, elsewhere lines, always of steps 1 and last."""

    def __init__(self, label: str, steps: int, console: Console | None = None):
        super().__init__(label, steps, kept=True, console=console)

    def show(self, row: dict[str, Any]) -> None:
        self.move_to(row["step"], note=describe(row))

    def line_is_due(self) -> bool:
        return self.done in (1, self.total) or super().line_is_due()

    def line(self, note: str) -> str:
        return f"{self.label} step {self.done}/{self.total}  {note}"


def describe(row: dict[str, Any]) -> str:
    """A training row in short: loss, speed, share of peak."""
    unit = unit_of(row)
    short = "tok" if unit == "tokens" else unit
    # A number that is not finite is null in the row.
    loss = "nan" if row["loss"] is None else f"{row['loss']:.3f}"
    words = [f"loss {loss}", f"{row[f'{unit}_per_s']:,.0f} {short}/s"]
    if row.get("accuracy") is not None:
        words.append(f"accuracy {row['accuracy']:.2f}")
    if row.get("reward_margin") is not None:
        words.append(f"margin {row['reward_margin']:.3f}")
    if row.get("mfu") is not None:
        words.append(f"{row['mfu']:.0%} of peak")
    return "  ".join(words)


def unit_of(row: dict[str, Any]) -> str:
    """The unit of a training row's loss: tokens, pairs."""
    return next(name.removesuffix("_per_s") for name in row if name.endswith("_per_s"))
