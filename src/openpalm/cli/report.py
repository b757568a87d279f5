"""`openpalm report`: shows runs as one HTML page, or as curves in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpalm.base.settings import parse
from openpalm.base.typed import home
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.report.runs import Run


@dataclass(frozen=True)
class ReportSettings:
    """The runs and the output."""

    runs: list[str]
    """run directories; several are compared. Also .json files of `openpalm eval --tasks --out`"""
    out: Path | None = None
    """HTML file to write; default: report.html in the first run, or next to the first .json file"""
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
            "openpalm report scores.json",
        ],
        positional=["runs"],
    )
    paths = [Path(home(path)) for path in settings.runs]
    scores = [path for path in paths if path.suffix == ".json" and not path.is_dir()]
    folders = [path for path in paths if path not in scores]
    from openpalm.report.runs import read_runs

    runs = read_runs(folders)
    if settings.plot and not runs:
        raise SettingsError(f"--plot {settings.plot}: scores of tasks have no curve; give a run")
    if settings.plot:
        from openpalm.report.terminal_plots import print_losses

        print_losses(runs, settings.plot)
    if settings.plot is None or settings.out:
        print(_write(settings.out or _default_page(paths[0], scores), runs, scores))


def _default_page(first: Path, scores: list[Path]) -> Path:
    return first.with_suffix(".html") if first in scores else first / "report.html"


def _write(out: Path, runs: "list[Run]", scores: list[Path]) -> Path:
    """Writes the page about runs and files of scores."""
    from openpalm.report.compare import comparison_sections
    from openpalm.report.page import environment_section, write_page
    from openpalm.report.run_page import sections_of
    from openpalm.report.task_scores import read_scores, scores_section

    names = [run.name for run in runs] + [path.name for path in scores]
    title = ", ".join(names) if len(names) <= 4 else f"{len(runs)} runs"
    sections = [scores_section(read_scores(path), f"{path.name}: tasks") for path in scores]
    if runs:
        sections += sections_of(runs[0]) if len(runs) == 1 else comparison_sections(runs)
    write_page(out, f"OpenPaLM: {title}", [*sections, environment_section()])
    return out
