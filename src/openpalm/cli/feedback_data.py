"""`openpalm feedback export` and `openpalm feedback import`: files out of and into a project."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openpalm.base.settings import check, parse
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.feedback.models import Project

VERBS = ("export", "import")


@dataclass(frozen=True)
class ExportSettings:
    """Which judgements, in which format, to which file."""

    project: str
    """the project's name in URLs"""
    out: Path
    """file to write, replaced when it is complete"""
    format: str = "records"
    """records, pairs, conversations, hh, kto, kto-pairs, ratings, rankings, scores, messages,
    sharegpt, prompt-completion, alpaca or csv"""
    consensus: bool = False
    """one row for each item: the majority of its comparisons or thumbs, the order of its rankings
    by Bradley-Terry, the median of its ratings"""
    dir: str | None = None
    """folder of the site's database; default: OPENPALM_FEEDBACK_DIR, or feedback"""
    database_url: str | None = None
    """postgresql://user:password@host/name; default: DATABASE_URL, or SQLite in --dir"""

    def __post_init__(self) -> None:
        from openpalm.data.rows.exports.stream import EXPORT_NAMES

        wanted = f"one of {', '.join(EXPORT_NAMES)}"
        check(self.format in EXPORT_NAMES, "format", self.format, wanted)


@dataclass(frozen=True)
class ImportSettings:
    """Which file, and what becomes of its rows."""

    project: str
    """the project's name in URLs"""
    file: Path
    """.jsonl, .jsonl.gz, .json, .csv with a header, or .txt with a prompt on each line"""
    what: str = "items"
    """items: prompts with their completions, to be judged; prompts: prompts alone"""
    held_out: float = 0.0
    """share of the prompts kept for comparisons of models, never trained on; with --what prompts"""
    gold: bool = False
    """judgements in the file are known answers: gold items"""
    needed: int | None = None
    """responses for each item; default: the project's overlap"""
    dir: str | None = None
    """folder of the site's database; default: OPENPALM_FEEDBACK_DIR, or feedback"""
    database_url: str | None = None
    """postgresql://user:password@host/name; default: DATABASE_URL, or SQLite in --dir"""

    def __post_init__(self) -> None:
        check(self.what in ("items", "prompts"), "what", self.what, "items or prompts")
        check(0 <= self.held_out <= 1, "held_out", self.held_out, "from 0 to 1")
        check(self.needed is None or 1 <= self.needed <= 20, "needed", self.needed, "1 to 20")


def run(argv: Sequence[str]) -> None:
    """`argv` begins with the verb."""
    if argv[0] == "export":
        _export(argv[1:])
    else:
        _import(argv[1:])


def _export(argv: Sequence[str]) -> None:
    settings = parse(
        ExportSettings,
        argv,
        verb="feedback export",
        about="Writes the judgements of a project that are in force, in memory that does not "
        "grow with their number. Rows that a format cannot hold are counted.",
        examples=[
            "openpalm feedback export demo --out judgements.jsonl",
            "openpalm feedback export demo --format pairs --consensus --out pairs.jsonl",
        ],
        positional=["project"],
    )
    project = _open(settings.dir, settings.database_url, settings.project)
    from openpalm.data.rows.exports.stream import write_export
    from openpalm.data.rows.read_result import StreamCounts
    from openpalm.feedback.accounts import audit
    from openpalm.feedback.judgements.consensus import consensus_records
    from openpalm.feedback.judgements.records import project_records

    counts = StreamCounts()
    every = project_records(project)
    records = consensus_records(project, counts) if settings.consensus else every
    write_export(settings.out, records, settings.format, counts)
    audit.record(
        "export.downloaded", user=None, project=project, target=settings.format, by="command"
    )
    print(f"{settings.out}: {counts.used} rows")
    _report(counts.report())


def _import(argv: Sequence[str]) -> None:
    settings = parse(
        ImportSettings,
        argv,
        verb="feedback import",
        about="Adds the rows of a file to a project, with every format that the other verbs "
        "read. What the project has already is counted and not added again.",
        examples=[
            "openpalm feedback import demo answers.jsonl",
            "openpalm feedback import demo prompts.jsonl --what prompts --held-out 0.2",
        ],
        positional=["project", "file"],
    )
    if not settings.file.is_file():
        raise SettingsError(f"--file {settings.file}: there is no such file")
    project = _open(settings.dir, settings.database_url, settings.project)
    from openpalm.feedback.accounts import audit
    from openpalm.feedback.imports.importer import Importer

    arguments = {
        "name": str(settings.file),
        "what": settings.what,
        "held_out": settings.held_out,
        "gold": settings.gold,
        "needed": settings.needed,
    }
    importer = Importer(project, settings.file, arguments)
    for _ in importer.run():
        pass
    result = importer.result()
    audit.record(
        "import.done",
        user=None,
        project=project,
        target=settings.file.name,
        added=result["added"],
        by="command",
    )
    held = f", {result['held_out']} of them held out" if result["held_out"] else ""
    print(f"{settings.file}: {result['rows']} rows, {result['added']} added{held}")
    _report(result["lines"])


def _report(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"openpalm: {line}", file=sys.stderr)


def _open(folder: str | None, database_url: str | None, slug: str) -> "Project":
    """The project of the site's database. Raises SettingsError."""
    from openpalm.cli import feedback_site

    feedback_site.check_installed()
    site = feedback_site.Site("127.0.0.1", 0, feedback_site.folder_of(folder), database_url)
    site.check_database()
    site.set_environment()
    feedback_site.open_database(migrate=False)
    from openpalm.feedback.models import Project

    project = Project.objects.filter(slug=slug).first()
    if project is None:
        known = ", ".join(Project.objects.order_by("id").values_list("slug", flat=True)[:20])
        raise SettingsError(
            f"--project {slug}: the site has no such project; it has {known or 'none'}"
        )
    return project
