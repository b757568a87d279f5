"""HTML comparison of several runs: figures, a summary, settings that differ, samples."""

import html
import statistics
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from openpalm.report.page import SafeHtml, Section, table, tabs
from openpalm.report.plots import Line, Panel, comparison
from openpalm.report.run_page import sample_text, sections_of
from openpalm.report.runs import (
    AXES,
    Run,
    axis_label,
    differences,
    group_by_kind,
    group_by_seed,
    loss_unit,
    mean_of_last,
)

_REWARDED = (
    Panel("reward", "mean reward of rollouts, smoothed", smoothed=True),
    Panel("val_reward", "mean reward of held-out completions", marked=True),
    Panel("val_gold", "gold reward of held-out completions", marked=True),
    Panel("val_kl", "nats from the reference", marked=True),
)


def comparison_sections(runs: Sequence[Run]) -> list[Section]:
    """The sections of a page that compares two or more runs."""
    lines = [Line(i, group) for i, group in enumerate(group_by_seed(runs), 1)]
    sections = [Section("Runs", _legend(lines) + _summary(lines) + _seeds(lines))]
    kinds = [[line for line in lines if line.runs[0] in kind] for kind in group_by_kind(runs)]
    kinds = [kind for kind in kinds if kind]
    for i, kind in enumerate(kinds):
        of = "" if len(kinds) == 1 else f": {_numbers(kind)}"
        sections.append(Section(f"Learning{of}", _learning(kind, f"kind{i}")))
    sections.append(Section("Throughput", "".join(map(_throughput, _group_by_unit(lines)))))
    sections.append(Section("Settings that differ", _differences(lines)))
    if any(run.samples for run in runs):
        sections.append(Section("Samples", _side_by_side(lines)))
    return [*sections, Section("Each run", "".join(_folded(line, r) for line, r in _each(lines)))]


def _each(lines: Sequence[Line]) -> list[tuple[Line, Run]]:
    return [(line, run) for line in lines for run in line.runs]


def _key(line: Line) -> SafeHtml:
    """The legend key: the line in its colour and dashes, and its number."""
    dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
    return SafeHtml(
        '<svg width="28" height="10" aria-hidden="true"><path d="M1 5H27" stroke-width="3" '
        f'stroke="{line.colour}"{dashes}/></svg> <b style="color:{line.colour}">{line.number}</b>'
    )


def _legend(lines: Sequence[Line]) -> str:
    entries = []
    for line in lines:
        names = html.escape(", ".join(run.name for run in line.runs))
        seeds = f" (mean and range of {len(line.runs)} seeds)" if len(line.runs) > 1 else ""
        entries.append(f'<span class="key">{_key(line)} <span>{names}{seeds}</span></span> ')
    return f"<p>{''.join(entries)}</p>"


def _numbers(lines: Sequence[Line]) -> str:
    return f"{'run' if len(lines) == 1 else 'runs'} {', '.join(str(n.number) for n in lines)}"


def _summary(lines: Sequence[Line]) -> str:
    head = [
        "",
        "run",
        "parameters, millions",
        "steps",
        "trained on",
        "minutes",
        "median per second",
    ]
    head += ["share of peak, median", "training loss, last tenth"]
    head += ["validation loss, last", "validation bits per byte"]
    body = [
        (
            _key(line),
            run.name,
            run.parameters and run.parameters / 1e6,
            _steps(run),
            f"{run.steps[-1][run.unit]:,} {run.unit}",
            run.steps[-1]["elapsed_s"] / 60,
            run.median(f"{run.unit}_per_s"),
            run.median("mfu"),
            mean_of_last(run),
            run.last("val_loss"),
            run.last("val_bits_per_byte"),
        )
        for line, run in _each(lines)
    ]
    return f'<div class="wide">{table(head, body)}</div>'


def _steps(run: Run) -> str:
    """The number of steps, and of steps without an update."""
    done = run.steps[-1]["step"]
    text = f"{done:,}"
    if run.planned and done < run.planned:
        text += f" of {run.planned:,}"
    skipped = sum("skipped" in row for row in run.steps)
    return f"{text} ({skipped:,} skipped)" if skipped else text


def _seeds(lines: Sequence[Line]) -> str:
    """A table of mean and deviation over seeds; empty without repeated seeds."""
    body = []
    for line in lines:
        finals = [run.last("val_loss") for run in line.runs]
        known = [value for value in finals if value is not None]
        if len(known) > 1:
            mean, deviation = statistics.mean(known), statistics.stdev(known)
            body.append((_key(line), len(known), mean, deviation, min(known), max(known)))
    head = ["", "seeds", "validation loss, mean", "standard deviation", "lowest", "highest"]
    return f'<div class="wide">{table(head, body)}</div>' if body else ""


def _learning(lines: list[Line], name: str) -> str:
    """The learning curves of comparable runs, against each axis."""
    runs = [run for line in lines for run in line.runs]
    unit = loss_unit(runs[0].unit)
    data = {run.settings.get("run.data") for run in runs}
    bits = len(data) > 1 and all(run.last("val_bits_per_byte") is not None for run in runs)
    validation = (
        Panel("val_bits_per_byte", "validation, bits per byte", marked=True)
        if bits
        else Panel("val_loss", f"validation loss, {unit}", marked=True)
    )
    training = Panel("loss", f"training loss, {unit}, smoothed", smoothed=True)
    panels = [p for p in (training, validation, *_REWARDED) if _known(runs, p.column)]
    panes = [
        (
            axis_label(axis, runs[0].unit),
            comparison(lines, panels, axis, f"Learning against {axis}") + _note(runs, axis),
        )
        for axis in AXES
        if axis != "flops" or any(run.flops_per_token for run in runs)
    ]
    warning = "" if len(data) == 1 else _OTHER_DATA
    return _legend(lines) + tabs(name, "against", panes) + warning


_OTHER_DATA = (
    '<p class="muted">These runs have different data: losses per token of different tokenizers, or '
    "on different texts, cannot be compared.</p>"
)


def _note(runs: list[Run], axis: str) -> str:
    if axis != "flops":
        return ""
    without = [run.name for run in runs if run.flops_per_token is None]
    missing = f" Not known for {', '.join(without)}." if without else ""
    text = (
        "Training FLOPs are tokens times 6 N + 12 L h head_dim T of the run's config "
        f"(PaLM, appendix B), without evaluations.{missing}"
    )
    return f'<p class="muted">{html.escape(text)}</p>'


def _known(runs: Sequence[Run], column: str) -> bool:
    return any(run.last(column) is not None for run in runs)


def _group_by_unit(lines: Sequence[Line]) -> list[list[Line]]:
    units: dict[str, list[Line]] = {}
    for line in lines:
        units.setdefault(line.runs[0].unit, []).append(line)
    return list(units.values())


def _throughput(lines: list[Line]) -> str:
    unit, runs = lines[0].runs[0].unit, [run for line in lines for run in line.runs]
    wanted = [Panel(f"{unit}_per_s", f"{unit} per second", from_zero=True)]
    wanted.append(Panel("mfu", "share of the measured peak", from_zero=True))
    panels = [panel for panel in wanted if _known(runs, panel.column)]
    return _legend(lines) + comparison(lines, panels, "steps", "Throughput against steps")


def _differences(lines: Sequence[Line]) -> str:
    each = _each(lines)
    rows = [
        (name, *(value[:12] if name in ("run.data", "run.parent") else value for value in v))
        for name, v in differences([run for _, run in each])
    ]
    if not rows:
        return "<p>None: the runs have the same settings.</p>"
    head = ["setting", *(SafeHtml(f"{_key(line)} {html.escape(run.name)}") for line, run in each)]
    return f'<div class="wide">{table(head, rows)}</div>'


def _side_by_side(lines: Sequence[Line]) -> str:
    """Samples at steps that all runs have (the last one is open), else each run's last ones."""
    each = [(line, run) for line, run in _each(lines) if run.samples]
    by_step = [{row["step"]: row for row in run.samples} for _, run in each]
    common = sorted(set.intersection(*(set(rows) for rows in by_step)))
    chosen = sorted({common[0], common[len(common) // 2], common[-1]}) if common else []
    if not chosen:
        last = [run.samples[-1] for _, run in each]
        return "<p>The last samples of each run.</p>" + _columns(each, last)
    return "".join(
        f"<details{' open' * (step == chosen[-1])}><summary>after step {step:,}</summary>"
        f"{_columns(each, [rows[step] for rows in by_step])}</details>"
        for step in reversed(chosen)
    )


def _columns(each: list[tuple[Line, Run]], rows: list[dict[str, Any]]) -> str:
    same = len({row["step"] for row in rows}) == 1
    cells = []
    for (line, run), row in zip(each, rows, strict=True):
        name = html.escape(run.name) + ("" if same else f", step {row['step']:,}")
        cells.append(f"<div>{_key(line)} {name}</div>")
    for samples in zip_longest(*(row.get("samples", []) for row in rows)):
        cells += [sample_text(sample) if sample else "<div></div>" for sample in samples]
    columns = f"grid-template-columns: repeat({len(rows)}, minmax(15rem, 1fr))"
    return f'<div class="side-by-side" style="{columns}">{"".join(cells)}</div>'


def _folded(line: Line, run: Run) -> str:
    parts = "".join(f"<h3>{html.escape(s.heading)}</h3>{s.body}" for s in sections_of(run))
    name = html.escape(run.name)
    return f"<details><summary>{_key(line)} {name}</summary>{parts}</details>"
