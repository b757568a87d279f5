"""`openpalm feedback`: the web application that collects human feedback."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from openpalm.base.settings import parse
from openpalm.errors import SettingsError

MANAGE = "manage"


@dataclass(frozen=True)
class FeedbackSettings:
    """The address and the database of the site."""

    host: str = "127.0.0.1"
    """address to listen at"""
    port: int = 8080
    """port to listen at; 0 takes a free one"""
    dir: str = "feedback"
    """folder of the database, the secret key, snapshots and runs; made if missing"""
    database_url: str | None = None
    """postgresql://user:password@host/name; default: DATABASE_URL, or SQLite in --dir"""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise SettingsError(f"--port {self.port}: must be 0 (any free one) to 65535")


def run(argv: Sequence[str]) -> None:
    if argv and argv[0] == MANAGE:
        from openpalm.feedback.management import manage

        manage(argv[1:])
        return
    settings = parse(
        FeedbackSettings,
        argv,
        verb="feedback",
        about="Collects human feedback in the browser and turns it into better models.",
        examples=[
            "openpalm feedback",
            "openpalm feedback --port 8090 --dir data/feedback",
            "openpalm feedback --database-url postgresql://palm@localhost/feedback",
            "openpalm feedback manage createsuperuser",
        ],
    )
    os.environ["OPENPALM_FEEDBACK_DIR"] = settings.dir
    if settings.database_url:
        os.environ["DATABASE_URL"] = settings.database_url
    try:
        import django
        import waitress
    except ImportError as error:
        raise SettingsError(
            f"{error.name} is missing; `pip install 'openpalm[feedback]'` installs the packages "
            "that collecting feedback needs"
        ) from None
    del django
    from openpalm.feedback.management import manage
    from openpalm.feedback.wsgi import application

    manage(["migrate", "--verbosity", "0"])
    waitress.serve(application, host=settings.host, port=settings.port, threads=8)
