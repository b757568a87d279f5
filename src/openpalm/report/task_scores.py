"""Scores of lm-evaluation-harness tasks: read from a file, as table rows and as HTML.

`openpalm eval --tasks` writes the file, and tasks.json in a run directory.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from openpalm.base.json_file import read_json
from openpalm.errors import DataError
from openpalm.report.page import Section, table

SCORES_FILE = "tasks.json"
"""In a run directory."""
TASK_COLUMN = "task/"
"""What the columns of tasks in metrics.jsonl begin with: task/NAME/METRIC."""
_MOST = 8
"""Measurements of a run shown, besides the last."""
COLUMNS = ("task", "metric", "value", "standard error", "rows", "shots", "GPT-J 6B")
PUBLISHED = {
    ("lambada_openai", "perplexity"): 3.99,
    ("lambada_openai", "acc"): 0.697,
    ("winogrande", "acc"): 0.653,
    ("hellaswag", "acc_norm"): 0.661,
    ("piqa", "acc"): 0.765,
}
"""GPT-J 6B without examples, from the README of mesh-transformer-jax. It does not say which
accuracy: for HellaSwag the one normalised by length is meant, the other is about 0.5."""
_NOTE = (
    '<p class="muted">GPT-J 6B: figures of the mesh-transformer-jax README, without examples in '
    "the prompt, over all rows.</p>"
)


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a file of scores. Raises DataError if it is another file."""
    found = read_json(path, "run `openpalm eval --tasks` again")
    scores = found.get("scores")
    if not isinstance(scores, list) or not all(map(_is_score, scores)):
        raise DataError(f"{path}: holds no scores of tasks; give a file of `openpalm eval --out`")
    return found


def _is_score(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ("task", "metric"))
        and isinstance(row.get("value"), int | float)
        and all(isinstance(row.get(n), int | float | None) for n in ("stderr", "rows", "shots"))
    )


def score_rows(scores: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows of COLUMNS; a published figure is left empty if there is none for the metric."""
    return [
        (
            row["task"],
            row["metric"],
            _figure(row["value"]),
            _figure(row.get("stderr")),
            row.get("rows"),
            row.get("shots"),
            _figure(PUBLISHED.get((row["task"], row["metric"]))),
        )
        for row in scores
    ]


def _figure(value: float | None) -> str | None:
    """Four digits after the point, as the library prints, unless the number is large."""
    if value is None:
        return None
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def scores_section(found: dict[str, Any], heading: str) -> Section:
    """The scores of a file, next to the published ones."""
    facts = [f"weights in {found['weights']}"] if found.get("weights") else []
    facts += [f"the first {found['limit']} rows of each task"] if found.get("limit") else []
    facts += ["prompts as conversations"] if found.get("chat_template") else []
    caption = f'<p class="muted">{html.escape("; ".join(facts))}</p>' if facts else ""
    scores = table(COLUMNS, score_rows(found["scores"]))
    return Section(heading, f'<div class="wide">{scores}</div>{caption}{_NOTE}')


def probed_section(rows: Sequence[dict[str, Any]], heading: str) -> Section | None:
    """The scores measured during training, a column for each time; None if there are none."""
    measured = [row for row in rows if any(name.startswith(TASK_COLUMN) for name in row)]
    if not measured:
        return None
    names = dict.fromkeys(n for row in measured for n in row if n.startswith(TASK_COLUMN))
    shown = measured[:: -(-len(measured) // _MOST)]
    shown += [] if shown[-1] is measured[-1] else measured[-1:]
    columns = ["task", "metric", *(f"step {row['step']:,}" for row in shown), COLUMNS[-1]]
    body = []
    for name in names:
        task, _, metric = name.removeprefix(TASK_COLUMN).rpartition("/")
        values = [_figure(row.get(name)) for row in shown]
        body.append((task, metric, *values, _figure(PUBLISHED.get((task, metric)))))
    return Section(heading, f'<div class="wide">{table(columns, body)}</div>{_NOTE}')
