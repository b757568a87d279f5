"""`openpalm feedback`: the web application that collects human feedback."""

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from openpalm.base.settings import parse
from openpalm.cli import feedback_data
from openpalm.errors import SettingsError, one_line

MANAGE, WEB, WORKER = "manage", "web", "worker"


@dataclass(frozen=True)
class FeedbackSettings:
    """The address and the database of the site."""

    host: str = "127.0.0.1"
    """address to listen at; others than this machine's own need OPENPALM_FEEDBACK_HOSTS"""
    port: int = 8080
    """port to listen at; 0 takes a free one"""
    dir: str | None = None
    """folder of the database, the secret key, snapshots and runs, made if missing; default:
    OPENPALM_FEEDBACK_DIR, or feedback"""
    database_url: str | None = None
    """postgresql://user:password@host/name; default: DATABASE_URL, or SQLite in --dir"""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise SettingsError(f"--port {self.port}: must be 0 (any free one) to 65535")


def run(argv: Sequence[str]) -> None:
    if argv and argv[0] == MANAGE:
        _manage(argv[1:])
        return
    if argv and argv[0] in feedback_data.VERBS:
        feedback_data.run(argv)
        return
    part = argv[0] if argv and argv[0] in (WEB, WORKER) else ""
    settings = parse(
        FeedbackSettings,
        argv[1:] if part else argv,
        verb="feedback",
        about="Collects human feedback in the browser and turns it into better models. Runs the "
        "web process and the worker; `openpalm feedback web` and `openpalm feedback worker` run "
        "one of them, `openpalm feedback export` and `import` move files, `openpalm feedback "
        "manage` runs Django's commands.",
        examples=[
            "openpalm feedback",
            "openpalm feedback --port 8090 --dir data/feedback",
            "openpalm feedback --database-url postgresql://palm@localhost/feedback",
            "openpalm feedback manage createsuperuser",
        ],
    )
    from openpalm.cli import feedback_site

    feedback_site.check_installed()
    folder = feedback_site.folder_of(settings.dir)
    site = feedback_site.Site(settings.host, settings.port, folder, settings.database_url)
    site.set_environment()
    if part == WORKER:
        run_worker()
        return
    site.check_host()
    with site.listen() as listening:
        if part == WEB:
            from openpalm.feedback.web import serve

            feedback_site.open_database(migrate=False)
            serve(listening)
        else:
            _run_all(site, listening)


def _manage(words: Sequence[str]) -> None:
    """A Django command. Raises SettingsError for a database that is away or has no tables."""
    from openpalm.cli import feedback_site

    feedback_site.check_installed()
    from django.db import OperationalError, ProgrammingError

    from openpalm.feedback.manage_command import manage

    try:
        if words[:1] == ["migrate"]:
            feedback_site.open_database(migrate=False, current=False)
        manage(words)
    except (OperationalError, ProgrammingError) as error:
        reason = one_line(error, 300)
        raise SettingsError(
            f"the database cannot be used ({reason}); `openpalm feedback manage migrate` makes its "
            "tables"
        ) from None


def _run_all(site, listening) -> None:
    from openpalm.cli import feedback_site
    from openpalm.feedback.supervisor import Supervisor

    feedback_site.open_database()
    url = feedback_site.url_of(listening)
    setup = feedback_site.setup_lines(url)

    def ready() -> None:
        with suppress(OSError):
            print(f"feedback: {url}/; Ctrl-C ends it", *setup, sep="\n", flush=True)

    # Visitors who come while it ends are refused: they would wait for nothing.
    children = feedback_site.children(site, listening)
    Supervisor(children, say=say).run(ready, ending=listening.close)


def say(line: str) -> None:
    # A log on a full disk ends no site.
    with suppress(OSError):
        print(f"openpalm: {line}", file=sys.stderr, flush=True)


def run_worker() -> None:
    """Runs jobs until SIGTERM or Ctrl-C; a training saves and continues with the next worker."""
    from openpalm.cli import feedback_site

    feedback_site.open_database(migrate=False)
    from openpalm.feedback.worker.loop import Worker

    worker = Worker()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.ending.set())
    worker.run()
