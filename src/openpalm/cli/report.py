"""`openpalm report`: runs in, one HTML page out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpalm.settings import parse


@dataclass(frozen=True)
class ReportSettings:
    """What to draw, and where to."""

    runs: list[str]
    """directories of runs"""
    out: Path | None = None
    """the page; not set is report.html in the first run"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ReportSettings,
        argv,
        verb="report",
        about="Draws runs as one HTML page: loss, throughput, samples, settings, environment.",
        examples=["openpalm report runs/tiny", "openpalm report runs/a runs/b --out ab.html"],
        positional=["runs"],
    )
    from openpalm.report import environment_section, run_sections, write_page

    runs = [Path(path) for path in settings.runs]
    sections = [section for path in runs for section in run_sections(path)]
    out = settings.out or runs[0] / "report.html"
    title = "OpenPaLM: " + ", ".join(path.name for path in runs)
    write_page(out, title, [*sections, environment_section()])
    print(out)
