"""What the directories of runs say: rows, settings, sizes, and which runs can be compared.

Draws nothing. The rows may be of a run that is still going on, or of one that was killed.
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
from openpalm.train.metrics import read_rows, unit_of

Axis = Literal["steps", "tokens", "minutes", "flops"]
AXES: tuple[Axis, ...] = get_args(Axis)
Curve = tuple[list[float], list[float]]

_WHAT_THE_LOSS_IS = ("loss", "advantage", "critic", "template")
"""settings that exist for some objectives only, or choose one"""
_NOT_CHOICES = ("out", "run.peak_flops", "run.minutes")
"""settings that say where a run is or what was measured, not what was wanted"""


@dataclass(frozen=True)
class Run:
    """A run as its directory shows it."""

    path: Path
    name: str
    """of the directory, with as much of the path as tells it from the others"""
    rows: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    """the training rows among them"""
    samples: list[dict[str, Any]]
    settings: dict[str, str]
    """dotted name -> value; `run.` names are of run.json"""
    unit: str
    """what the loss averages over"""
    parameters: int | None
    flops_per_token: int | None
    """None where the run has no checkpoint yet, or a step costs other FLOPs than its tokens'"""

    @property
    def kind(self) -> tuple[str, ...]:
        """Losses of runs of one kind mean the same."""
        return (self.unit, *(self.settings.get(name, "") for name in _WHAT_THE_LOSS_IS))

    @property
    def planned(self) -> int | None:
        """Steps that the run shall have."""
        return _whole(self.settings.get("run.steps"))

    def curve(self, column: str, axis: Axis) -> Curve:
        """A column's known values against an axis; empty where the run cannot tell."""
        if axis == "flops" and self.flops_per_token is None:
            return [], []
        own = self.rows if axis == "steps" else self.steps
        places = {row["step"]: self._place(row, axis) for row in own}
        known = [
            (places[row["step"]], row[column])
            for row in self.rows
            if is_number(row.get(column)) and row["step"] in places
        ]
        return [x for x, _ in known], [y for _, y in known]

    def last(self, column: str) -> float | None:
        """The newest known value of a column."""
        values = self.curve(column, "steps")[1]
        return values[-1] if values else None

    def median(self, column: str) -> float | None:
        values = sorted(self.curve(column, "steps")[1])
        return values[len(values) // 2] if values else None

    def _place(self, row: dict[str, Any], axis: Axis) -> float:
        if axis == "steps":
            return row["step"]
        if axis == "minutes":
            return row["elapsed_s"] / 60
        return row[self.unit] * (self.flops_per_token or 0 if axis == "flops" else 1)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, each once. Raises DataError where a directory holds no run."""
    given = {path.resolve(): path for path in paths}
    return [_read(path, name) for path, name in zip(given.values(), _names([*given]), strict=True)]


def _read(path: Path, name: str) -> Run:
    if not (path / "metrics.jsonl").is_file():
        raise DataError(f"{path}: holds no metrics.jsonl; give the directory of a run")
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
    """A loss may be null: the step was skipped."""
    units = [name.removesuffix("_per_s") for name in row if name.endswith("_per_s")]
    wanted = ["elapsed_s", *units, *(f"{unit}_per_s" for unit in units)]
    return "loss" in row and bool(units) and all(is_number(row.get(name)) for name in wanted)


def _sizes(path: Path, sequence_length: str | None) -> tuple[int | None, int | None]:
    """Parameters and FLOPs a token (PaLM, appendix B), as the newest checkpoint's config says."""
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
    """Nested settings as dotted names and values."""
    rows: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows


def _names(paths: Sequence[Path]) -> list[str]:
    """Of each of the distinct paths the shortest end that no other has."""
    names = []
    for path in paths:
        ends = (path.parts[-n:] for n in range(1, 1 + len(path.parts)))
        own = next(e for e in ends if sum(p.parts[-len(e) :] == e for p in paths) == 1)
        names.append("/".join(own))
    return names


def group_by_kind(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups whose losses can be compared, in the order given."""
    kinds: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind, []).append(run)
    return list(kinds.values())


def group_by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups that differ in nothing but their seed."""
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
    """The settings that are not the same in all runs, with each run's value."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    table = [(name, [run.settings.get(name, "not set") for run in runs]) for name in names]
    return [(n, values) for n, values in table if n not in _NOT_CHOICES and len({*values}) > 1]


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential mean over about `share` of the curve, unbiased at its start."""
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
    return "nats a token" if unit == "tokens" else f"mean over {unit}"


def axis_label(axis: Axis, unit: str) -> str:
    """As a figure writes it: training tokens may be pairs."""
    return {"steps": "steps", "tokens": unit, "minutes": "minutes", "flops": "training FLOPs"}[axis]
