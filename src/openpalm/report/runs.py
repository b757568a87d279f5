"""Reads run directories: metrics, settings, sizes, and which runs can be compared.

A run may be unfinished or still running.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from openpalm.base.json_file import read_json
from openpalm.base.yaml_file import read_yaml
from openpalm.checkpoint import directory as checkpoint
from openpalm.errors import CheckpointError, DataError
from openpalm.train.logging.metrics import read_rows, unit_of

Axis = Literal["steps", "tokens", "minutes", "flops"]
AXES: tuple[Axis, ...] = get_args(Axis)
Curve = tuple[list[float], list[float]]

_WHAT_THE_LOSS_IS = ("loss", "advantage", "critic", "template")
"""settings that choose the objective"""
_NOT_CHOICES = ("out", "run.peak_flops", "run.minutes")
"""settings that are a path or a measurement, not a choice"""


@dataclass(frozen=True)
class Run:
    """A run, read from its directory."""

    path: Path
    name: str
    """name of the directory, with as much of the path as makes it unique"""
    rows: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    """the training rows"""
    samples: list[dict[str, Any]]
    settings: dict[str, str]
    """dotted name -> value; `run.` names are of run.json"""
    unit: str
    """unit that the loss is averaged over"""
    parameters: int | None
    flops_per_token: int | None
    """None without a checkpoint, or if the FLOPs of a step do not follow from its tokens"""

    @property
    def kind(self) -> tuple[str, ...]:
        """Runs of the same kind have comparable losses."""
        return (self.unit, *(self.settings.get(name, "") for name in _WHAT_THE_LOSS_IS))

    @property
    def planned(self) -> int | None:
        """Number of steps of the finished run."""
        return _whole(self.settings.get("run.steps"))

    def curve(self, column: str, axis: Axis) -> Curve:
        """The values of a column against an axis; empty if the axis is not known."""
        if axis == "flops" and self.flops_per_token is None:
            return [], []
        rows = self.rows if axis == "steps" else self.steps
        positions = {row["step"]: self._position(row, axis) for row in rows}
        known = [
            (positions[row["step"]], row[column])
            for row in self.rows
            if is_number(row.get(column)) and row["step"] in positions
        ]
        return [x for x, _ in known], [y for _, y in known]

    def last(self, column: str) -> float | None:
        """The last value of a column."""
        values = self.curve(column, "steps")[1]
        return values[-1] if values else None

    def median(self, column: str) -> float | None:
        values = sorted(self.curve(column, "steps")[1])
        return values[len(values) // 2] if values else None

    def _position(self, row: dict[str, Any], axis: Axis) -> float:
        if axis == "steps":
            return row["step"]
        if axis == "minutes":
            return row["elapsed_s"] / 60
        return row[self.unit] * (self.flops_per_token or 0 if axis == "flops" else 1)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, without repeated paths. Raises DataError for a directory without a run."""
    given = {path.resolve(): path for path in paths}
    return [_read(path, name) for path, name in zip(given.values(), _names([*given]), strict=True)]


def _read(path: Path, name: str) -> Run:
    if not (path / "metrics.jsonl").is_file():
        raise DataError(f"{path}: holds no metrics.jsonl; give a run directory")
    rows = read_rows(path / "metrics.jsonl")
    steps = [row for row in rows if _is_training(row)]
    if not steps:
        raise DataError(f"{path}: its metrics.jsonl has no training row yet")
    unit = unit_of(steps[-1])
    samples = path / "samples.jsonl"
    settings = dict(flat(_settings(path)))
    parameters, flops = _sizes(path, settings.get("sequence_length"))
    exact = any(is_number(row.get("mfu")) for row in steps)
    return Run(
        path=path,
        name=name,
        rows=rows,
        steps=[row for row in steps if unit_of(row) == unit],
        samples=read_rows(samples) if samples.is_file() else [],
        settings=settings,
        unit=unit,
        parameters=parameters,
        flops_per_token=flops if exact else None,
    )


def _settings(path: Path) -> dict[str, Any]:
    """The settings, with what the run measured and chose; 0.1 kept that in `chosen` among them."""
    settings = read_yaml(path / "config.yaml")
    info = settings.pop("chosen", {})
    if (path / "run.json").is_file():
        info = read_json(path / "run.json", "it is gone")
    return settings | {"run": info}


def _is_training(row: dict[str, Any]) -> bool:
    """Whether this is a training row; its loss is null if the step was skipped."""
    units = [name.removesuffix("_per_s") for name in row if name.endswith("_per_s")]
    wanted = ["elapsed_s", *units, *(f"{unit}_per_s" for unit in units)]
    return "loss" in row and bool(units) and all(is_number(row.get(name)) for name in wanted)


def _sizes(path: Path, sequence_length: str | None) -> tuple[int | None, int | None]:
    """Parameters and FLOPs per token (PaLM, appendix B) from the newest checkpoint's config."""
    saved = checkpoint.steps(path)
    try:
        config = checkpoint.load_config(saved[-1]) if saved else None
    except CheckpointError:
        config = None
    if config is None:
        return None, None
    return config.parameters, config.flops_per_token(_whole(sequence_length))


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flat(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as pairs of dotted name and value."""
    rows: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows


def _names(paths: Sequence[Path]) -> list[str]:
    """For each path the shortest end that no other path has."""
    names = []
    for path in paths:
        ends = (path.parts[-n:] for n in range(1, 1 + len(path.parts)))
        own = next(e for e in ends if sum(p.parts[-len(e) :] == e for p in paths) == 1)
        names.append("/".join(own))
    return names


def group_by_kind(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs with comparable losses, in the given order."""
    kinds: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind, []).append(run)
    return list(kinds.values())


def group_by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that differ only in their seed."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        rest = ((k, v) for k, v in run.settings.items() if k not in ("seed", *_NOT_CHOICES))
        groups.setdefault(tuple(sorted(rest)), []).append(run)
    found: list[list[Run]] = []
    for group in groups.values():
        distinct = len({run.settings.get("seed") for run in group}) == len(group)
        found += [group] if distinct else [[run] for run in group]
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that differ between the runs, with the value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    table = [(name, [run.settings.get(name, "not set") for run in runs]) for name in names]
    return [(n, values) for n, values in table if n not in _NOT_CHOICES and len({*values}) > 1]


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential moving average over about `share` of the curve, with bias correction."""
    keep = 1 - 1 / max(1.0, share * len(values))
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def mean_of_last(run: Run) -> float:
    """Mean loss over the last tenth of the run's steps."""
    tenth = run.steps[-max(1, len(run.steps) // 10) :]
    losses = [row["loss"] for row in tenth if is_number(row["loss"])]
    return sum(losses) / len(losses) if losses else math.nan


def loss_unit(unit: str) -> str:
    return "nats per token" if unit == "tokens" else f"mean over {unit}"


def axis_label(axis: Axis, unit: str) -> str:
    """The label of an axis; the unit of training may be pairs in place of tokens."""
    return {"steps": "steps", "tokens": unit, "minutes": "minutes", "flops": "training FLOPs"}[axis]
