"""Reads runs and draws them: one HTML page that needs nothing beside it.

Whatever came out of a model or a file is escaped; the page loads nothing from anywhere.
"""

import html
import io
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpalm import __version__
from openpalm.errors import DataError, SettingsError
from openpalm.settings import read_yaml
from openpalm.train.metrics import read_rows, unit_of

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; margin: .8rem 0; } caption { text-align: left; color: #57606a; }
th, td { border-bottom: 1px solid #d8dee4; padding: .3rem .8rem .3rem 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; min-width: 5rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
pre { background: #f6f8fa; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: #0550ae; } .muted { color: #57606a; }
"""

_TRAINING_COLUMNS = {"loss", "elapsed_s"}


@dataclass(frozen=True)
class Section:
    """A heading and ready HTML below it."""

    heading: str
    body: str


def write_page(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Writes the page, whole or not at all. Raises SettingsError where `path` is a directory."""
    if path.is_dir():
        raise SettingsError(f"--out {path}: is a directory; give the name of a page in it")
    parts = [f"<section><h2>{html.escape(s.heading)}</h2>{s.body}</section>" for s in sections]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def run_sections(run: Path) -> list[Section]:
    """A run's curves, what it wrote on the way, and its settings.

    Raises DataError where the directory holds no run.
    """
    if not (run / "metrics.jsonl").is_file():
        raise DataError(f"{run}: holds no metrics.jsonl; give the directory of a run")
    rows = read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if row.keys() >= _TRAINING_COLUMNS]
    if not steps:
        raise DataError(f"{run}: its metrics.jsonl has no training row yet")
    sections = [Section(f"{run.name}: learning", _learning(steps, rows))]
    if (run / "samples.jsonl").is_file():
        samples = _samples(read_rows(run / "samples.jsonl"))
        sections.append(Section(f"{run.name}: what it writes", samples))
    settings = _flat(read_yaml(run / "config.yaml"))
    sections.append(Section(f"{run.name}: settings", table(["setting", "value"], settings)))
    return sections


def environment_section() -> Section:
    """The machine and the versions that made the figures."""
    import torch

    facts = [
        ("OpenPaLM", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        (
            "machine",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}",
        ),
    ]
    if torch.cuda.is_available():
        facts.append(("GPU", torch.cuda.get_device_name()))
    return Section("Environment", table(["", ""], facts))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; numbers are aligned."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    header = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return f"<table>{header}<tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f'<td class="number">{text}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _learning(steps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    last, evaluated = steps[-1], [row for row in rows if "val_loss" in row]
    unit = unit_of(last)
    facts: list[tuple[str, object]] = [
        ("steps", last["step"]),
        (unit, last[unit]),
        ("minutes", last["elapsed_s"] / 60),
        (f"{unit} a second, median", _median([row[f"{unit}_per_s"] for row in steps])),
        ("training loss, last tenth", _mean_of_last(steps)),
    ]
    shares = [row["mfu"] for row in steps if row.get("mfu") is not None]
    if shares:
        facts.append(("share of the measured matrix-multiply peak, median", _median(shares)))
    if evaluated:
        facts.append((f"validation loss, {_loss_unit(unit)}", evaluated[-1]["val_loss"]))
    if evaluated and evaluated[-1].get("val_bits_per_byte") is not None:
        facts.append(("validation bits a byte", evaluated[-1]["val_bits_per_byte"]))
    skipped = sum("skipped" in row for row in steps)
    if skipped:
        facts.append(("steps skipped", skipped))
    rewarded = _reward_curves(steps, rows) if "reward" in last else ""
    return table(["", ""], facts) + rewarded + _curves(steps, evaluated)


def _loss_unit(unit: str) -> str:
    return "nats a token" if unit == "tokens" else f"mean over {unit}"


def _curves(steps: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> str:
    """Loss against steps, and throughput, as one inline SVG."""
    figure, (loss, speed) = _figure(width_ratios=[2, 1])
    whole = [row for row in steps if row["loss"] is not None]
    x = [row["step"] for row in whole]
    y = [row["loss"] for row in whole]
    loss.plot(x, y, color="#9ecbff", linewidth=0.8, label="training, each step")
    loss.plot(x, _smooth(y), color="#0550ae", label="training, smoothed")
    _dots(loss, evaluated, "val_loss", "validation")
    unit = unit_of(steps[-1])
    loss.set(xlabel="step", ylabel=f"loss ({_loss_unit(unit)})")
    loss.legend(frameon=False)
    rates = [row[f"{unit}_per_s"] for row in steps]
    speed.plot([row["step"] for row in steps], rates, color="#57606a")
    speed.set(xlabel="step", ylabel=f"{unit} a second", ylim=(0, None))
    return _svg(figure, "Loss and throughput against steps")


def _reward_curves(steps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Of a run on its own answers: rewards, and the distance to the reference."""
    figure, (reward, distance) = _figure(width_ratios=[2, 1])
    x, y = [row["step"] for row in steps], [row["reward"] for row in steps]
    reward.plot(x, y, color="#9ecbff", linewidth=0.8, label="rollouts")
    reward.plot(x, _smooth(y), color="#0550ae", label="rollouts, smoothed")
    _dots(reward, rows, "val_reward", "held-out answers")
    _dots(reward, rows, "val_gold", "held-out answers, gold", color="#1a7f37")
    reward.set(xlabel="step", ylabel="mean reward")
    reward.legend(frameon=False)
    _dots(distance, rows, "val_kl", "held-out answers")
    distance.set(xlabel="step", ylabel="nats from the reference")
    return _svg(figure, "Reward and distance to the reference against steps")


def _figure(width_ratios: list[int]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(1, 2, width_ratios=width_ratios)


def _dots(
    axes: Any, rows: list[dict[str, Any]], column: str, label: str, color: str = "#bc4c00"
) -> None:
    """The rows that have the column."""
    known = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "o-", color=color, label=label)


def _svg(figure: Any, label: str) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return f'<figure role="img" aria-label="{label}">{svg[svg.index("<svg") :]}</figure>'


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Exponential mean over about `share` of the curve, unbiased at its start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _samples(rows: list[dict[str, Any]]) -> str:
    shown = [rows[0], rows[len(rows) // 2], rows[-1]] if len(rows) > 2 else rows
    blocks = []
    for row in shown:
        texts = "".join(
            f'<pre><span class="prompt">{html.escape(str(sample["prompt"]))}</span>'
            f"{html.escape(str(sample['text']))}</pre>"
            for sample in row.get("samples", [])
        )
        blocks.append(f'<p class="muted">after step {row["step"]:,}</p>{texts}')
    return "".join(blocks)


def _flat(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in mapping.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, str(value)))
    return rows


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _mean_of_last(steps: list[dict[str, Any]]) -> float:
    losses = [row["loss"] for row in steps[-max(1, len(steps) // 10) :] if row["loss"] is not None]
    return sum(losses) / len(losses) if losses else math.nan
