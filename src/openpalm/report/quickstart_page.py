"""The report of `openpalm quickstart`: one HTML page with results, questions and curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpalm.data.dataset.manifest import Manifest
from openpalm.report.page import Section, environment_section, table, write_page
from openpalm.report.run_page import run_sections

SHOWN = 12
"""Questions on the page."""


@dataclass(frozen=True)
class Asked:
    """A question, its reference answer, and the model's answers before and after fine-tuning."""

    question: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Preferred:
    """Result of training on preferences: mean token F1 of answers sampled at temperature 1."""

    preferences: int
    before: float
    after: float


def write_page_of_quickstart(
    out: Path,
    manifest: Manifest,
    asked: Sequence[Asked],
    preferred: Preferred | None,
    summary: dict[str, Any],
) -> Path:
    """Writes report.html in the directory of the quickstart and returns its path."""
    train, val = manifest.splits["train"], manifest.splits["val"]
    rows = [
        ("processor", summary["processor"]),
        ("training text", f"{train.bytes:,} bytes, {train.tokens:,} tokens"),
        ("validation text", f"{val.bytes:,} bytes, {val.tokens:,} tokens"),
        ("validation bits per byte", round(summary["bits_per_byte"], 3)),
        ("gzip -9, bits per byte", round(summary["gzip"], 3)),
        ("order-5 model, bits per byte", round(summary["order5"], 3)),
        ("questions asked", len(asked)),
        ("token F1 before fine-tuning", round(summary["f1_before"], 3)),
        ("token F1 after fine-tuning", round(summary["f1_after"], 3)),
    ]
    runs = ["pretrain", "sft"]
    if preferred is not None:
        runs.append("dpo")
        rows += [
            ("preferences between its own answers", preferred.preferences),
            ("token F1 at temperature 1 before preferences", round(preferred.before, 3)),
            ("token F1 at temperature 1 after preferences", round(preferred.after, 3)),
        ]
    columns = ["question", "docstring", "before fine-tuning", "after"]
    shown = [(i.question, i.reference, i.before, i.after) for i in asked[:SHOWN]]
    page = out / "report.html"
    write_page(
        page,
        "OpenPaLM quickstart",
        [
            Section("Summary", table(["", ""], rows)),
            Section("Questions in held-out words", table(columns, shown)),
            *(section for run in runs for section in run_sections(out / run)),
            environment_section(),
        ],
    )
    return page
