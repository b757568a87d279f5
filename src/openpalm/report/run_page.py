"""HTML sections about one run: learning curves, samples and settings."""

import html
from pathlib import Path
from typing import Any

from openpalm.report.page import Section, table
from openpalm.report.plots import learning, rewards
from openpalm.report.runs import Run, loss_unit, mean_of_last, read_runs
from openpalm.report.task_scores import SCORES_FILE, probed_section, read_scores, scores_section


def run_sections(path: Path) -> list[Section]:
    """The sections of the run in a directory. Raises DataError if there is none."""
    return sections_of(read_runs([path])[0])


def sections_of(run: Run) -> list[Section]:
    """The sections about a run."""
    sections = [Section(f"{run.name}: learning", _learning(run))]
    if run.samples:
        sections.append(Section(f"{run.name}: samples", _samples(run.samples)))
    if probed := probed_section(run.rows, f"{run.name}: tasks during training"):
        sections.append(probed)
    if (scores := run.path / SCORES_FILE).is_file():
        sections.append(scores_section(read_scores(scores), f"{run.name}: tasks"))
    settings = table(["setting", "value"], run.settings.items())
    sections.append(Section(f"{run.name}: settings", settings))
    return sections


def _learning(run: Run) -> str:
    last, unit = run.steps[-1], run.unit
    facts: list[tuple[str, object]] = [
        ("parameters", run.parameters),
        ("steps", last["step"]),
        (unit, last[unit]),
        ("minutes", _rounded(last["elapsed_s"] / 60, 1)),
        (f"{unit} per second, median", _rounded(run.median(f"{unit}_per_s"), 0)),
        ("training loss, last tenth", _rounded(mean_of_last(run), 3)),
        ("share of the measured matrix-multiply peak, median", _percent(run.median("mfu"))),
        (f"validation loss, {loss_unit(unit)}", _rounded(run.last("val_loss"), 3)),
        ("validation bits per byte", _rounded(run.last("val_bits_per_byte"), 3)),
        ("steps skipped", sum("skipped" in row for row in run.steps) or None),
    ]
    known = [(name, value) for name, value in facts if value is not None]
    rewarded = rewards(run) if "reward" in last else ""
    return table(["", ""], known) + rewarded + learning(run)


def _rounded(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _samples(rows: list[dict[str, Any]]) -> str:
    shown = [rows[0], rows[len(rows) // 2], rows[-1]] if len(rows) > 2 else rows
    return "".join(
        f'<p class="muted">after step {row["step"]:,}</p>'
        + "".join(sample_text(sample) for sample in row.get("samples", []))
        for row in shown
    )


def sample_text(sample: dict[str, Any]) -> str:
    """A prompt and its completion, as HTML."""
    return (
        f'<pre><span class="prompt">{html.escape(str(sample["prompt"]))}</span>'
        f"{html.escape(str(sample['text']))}</pre>"
    )
