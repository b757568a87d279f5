"""`openpalm report`: shows runs as one HTML page, or as curves in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openpalm.base.settings import parse
from openpalm.base.typed import home


@dataclass(frozen=True)
class ReportSettings:
    """The runs and the output."""

    runs: list[str]
    """run directories; several are compared"""
    out: Path | None = None
    """HTML file to write; default: report.html in the first run"""
    plot: Literal["steps", "tokens", "minutes", "flops"] | None = None
    """plot the losses in the terminal against this axis, in place of the page; with --out, both"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ReportSettings,
        argv,
        verb="report",
        about="Writes an HTML page about runs, or plots their losses in the terminal. Several runs "
        "are compared: loss against steps, tokens, time and FLOPs, throughput, samples, and the "
        "settings that differ.",
        examples=[
            "openpalm report runs/tiny",
            "openpalm report runs/a runs/b --out ab.html",
            "openpalm report runs/a runs/b --plot minutes",
        ],
        positional=["runs"],
    )
    from openpalm.report.runs import read_runs

    runs = read_runs([Path(home(path)) for path in settings.runs])
    if settings.plot:
        from openpalm.report.terminal_plots import print_losses

        print_losses(runs, settings.plot)
    if settings.plot is None or settings.out:
        from openpalm.report.compare import comparison_sections
        from openpalm.report.page import environment_section, write_page
        from openpalm.report.run_page import sections_of

        out = settings.out or Path(home(settings.runs[0])) / "report.html"
        names = ", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"
        sections = sections_of(runs[0]) if len(runs) == 1 else comparison_sections(runs)
        write_page(out, f"OpenPaLM: {names}", [*sections, environment_section()])
        print(out)
